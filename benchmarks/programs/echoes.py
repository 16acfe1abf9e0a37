"""What the call benchmark calls."""

import woodfrog as modal

app = modal.App("echoes")


@app.function(enable_memory_snapshot=True)
def echo(data):
    return data
