"""Several processes: launching, whole copies (DDP), shares (FSDP2), and DeepSpeed."""
