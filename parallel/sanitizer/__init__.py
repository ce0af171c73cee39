"""The stream sanitizer: a device that runs everything on the host and checks what CUDA and NCCL could reorder."""
