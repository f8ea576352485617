"""Where class paths in configs written before `mmllm.data.loading.datamodules` existed find the data modules."""

from mmllm.data.loading.datamodules import AudioDataModule, ClipDataModule, PackedDataModule

__all__ = ["AudioDataModule", "ClipDataModule", "PackedDataModule"]
