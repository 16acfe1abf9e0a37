"""A transformer at random weights, of plain torch modules and of any size, in two classes: one whose snapshot has the
weights in device memory, one whose snapshot has them in host memory and that moves them after the restore.

What it is comes from the environment, at the deploy and in the container: MODEL_GIB, MODEL_VARIANT (plain, compile,
graphs), MODEL_DEVICE.
"""

import os

import torch
from served import Served
from torch import nn
from torch.nn import functional

import woodfrog as modal

ENV = {
    "MODEL_GIB": os.environ.get("MODEL_GIB", "1"),
    "MODEL_VARIANT": os.environ.get("MODEL_VARIANT", "plain"),
    "MODEL_DEVICE": os.environ.get("MODEL_DEVICE", "cuda"),
    # A pool of compiler processes would be part of every snapshot.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
GIB, VARIANT, DEVICE = float(ENV["MODEL_GIB"]), ENV["MODEL_VARIANT"], ENV["MODEL_DEVICE"]
# No network: what it needs, machines that lend a GPU may not have.
LIMITS = {"timeout": 900, "startup_timeout": 900, "scaledown_window": 600, "block_network": True}

WIDTHS = (128, 512, 1024, 2048, 4096, 8192)
VOCABULARY, TOKENS, HEAD = 4096, 128, 64
POOL = 1 << 24
BLOCK = 1 << 22

app = modal.App("transformer")


def shape(gib):
    """Width and number of blocks of a model of about that size: the widest of which there are eight."""
    size = gib * 2**30
    width = max((w for w in WIDTHS if 8 * 24 * w * w <= size), default=WIDTHS[0])
    return width, max(1, round(size / (24 * width * width)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        count, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(count, 3, width // HEAD, HEAD).permute(1, 2, 0, 3).unsqueeze(1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed[0].transpose(0, 1).reshape(count, width))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Decoder(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[-1]) @ self.embedding.weight.T


def build(gib, device):
    """The same weights wherever and whenever: pieces of one random pool, each a step further on, so that no two pages
    of memory are alike. Filling them is a copy: the quickest way there is to have a model."""
    width, blocks = shape(gib)
    with torch.device("meta"):
        model = Decoder(width, blocks).to(torch.bfloat16)
    model = model.to_empty(device=device)
    scale = 2.0 ** -round(width.bit_length() / 2)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(7)).mul_(scale).to(torch.bfloat16)
    pool = torch.cat((pool, pool)).to(device)
    step = 0
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 1:
                weights.fill_(1)
                continue
            for part in weights.view(-1).split(POOL):
                step += 1
                part.copy_(pool[step % POOL :][: part.numel()])
    return model.eval()


class Model:
    """The model, as the variant runs it."""

    def __init__(self, gib, variant, device):
        self.variant, self.device = variant, device
        self.model = build(gib, device)

    def ids(self, request):
        return (torch.arange(TOKENS) * 31 + request * 17) % VOCABULARY

    def ready(self, device):
        """Have it on the device, and all made that a first request would have to make."""
        self.device = device
        self.model.to(device)
        if self.variant == "compile":
            for block in self.model.blocks:  # they are alike: compiled once
                block.compile()
        with torch.inference_mode():
            self.model(self.ids(0).to(device))
            if self.variant == "graphs":
                self._record()
        self.answer(0)

    def _record(self):
        self.input = self.ids(0).to(self.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.model(self.input)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.model(self.input)

    def answer(self, request):
        with torch.inference_mode():
            if self.variant == "graphs":
                self.input.copy_(self.ids(request))
                self.graph.replay()
                logits = self.output
            else:
                logits = self.model(self.ids(request).to(self.device))
            return [round(x, 4) for x in logits[:16].float().tolist()]

    def weights(self):
        """A number that every byte of the weights, and its place, has a part in."""
        total = 0
        with torch.inference_mode():
            places = torch.arange(BLOCK, device=self.device, dtype=torch.int32) % 65521 + 1
            for number, weights in enumerate(self.model.parameters(), 1):
                for part in weights.view(torch.int16).view(-1).split(BLOCK):
                    found = int((part.to(torch.int32) * places[: part.numel()]).sum(dtype=torch.int64))
                    total = (total * 31 + number * found) % (1 << 61)
        return total

    def facts(self):
        found = {"weights": self.weights(), "torch": torch.__version__, "device": "CPU", "device_bytes": 0}
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            found |= {"device": torch.cuda.get_device_name(), "device_bytes": total - free}
        return found

    @staticmethod
    def gpus():
        """How many GPUs torch sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


@app.cls(
    gpu="any",
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
    env=ENV,
    **LIMITS,
)
class OnGpu(Served):
    @modal.enter(snap=True)
    def load(self):
        self.model = Model(GIB, VARIANT, DEVICE)
        self.model.ready(DEVICE)
        self.seen = Model.gpus()


@app.cls(gpu="any", enable_memory_snapshot=True, env=ENV, **LIMITS)
class OnCpu(Served):
    @modal.enter(snap=True)
    def load(self):
        self.model = Model(GIB, VARIANT, "cpu")
        self.seen = Model.gpus()

    @modal.enter(snap=False)
    def move(self):
        self.model.ready(DEVICE)
