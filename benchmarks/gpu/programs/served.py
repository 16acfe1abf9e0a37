"""What the classes of both programs answer to: their `model` is made, and the GPUs `seen`, when they are entered."""

import woodfrog as modal


class Served:
    @modal.method()
    def run(self, request):
        return self.model.answer(request)

    @modal.method()
    def facts(self):
        return {**self.model.facts(), "seen": [self.seen, self.model.gpus()], "restored": modal.restored()}
