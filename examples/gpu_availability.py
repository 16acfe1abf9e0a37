"""What a function sees of the GPU: nothing before the snapshot, everything after the thaw.

On a machine without a GPU, run it under `WOODFROG_GPU=none`: it is then False three times.
"""

import woodfrog as modal

app = modal.App("gpu-availability", image=modal.Image.debian_slim().pip_install("torch"))


@app.cls(enable_memory_snapshot=True, gpu="A10")
class GPUAvailability:
    @modal.enter(snap=True)
    def no_gpus_available_during_snapshots(self):
        import torch

        print(f"GPUs available: {torch.cuda.is_available()}")  # False

    @modal.enter(snap=False)
    def gpus_available_following_restore(self):
        import torch

        print(f"GPUs available: {torch.cuda.is_available()}")  # True

    @modal.method()
    def demo(self):
        import torch

        print(f"GPUs available: {torch.cuda.is_available()}")  # True
        return torch.cuda.is_available()


@app.local_entrypoint()
def main():
    GPUAvailability().demo.remote()
