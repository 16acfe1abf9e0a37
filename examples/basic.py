"""A function whose process is frozen after its imports. Run it with `woodfrog run examples/basic.py::my_func`."""

import woodfrog as modal

app = modal.App("basic")


@app.function(enable_memory_snapshot=True)
def my_func():
    print("hello")


@app.cls(enable_memory_snapshot=True)
class MyCls:
    @modal.enter(snap=True)
    def load(self):
        self.loaded = sum(range(1_000_000))

    @modal.method()
    def total(self):
        return self.loaded


@app.local_entrypoint()
def main():
    my_func.remote()
    print(MyCls().total.remote())
