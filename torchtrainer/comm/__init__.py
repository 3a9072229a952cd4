"""Process groups and what ranks tell each other; the only caller of ``torch.distributed``."""
