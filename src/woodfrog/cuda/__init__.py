"""The one caller of NVIDIA's driver: its checkpoint calls, from one warm helper process, and the node's GPUs."""
