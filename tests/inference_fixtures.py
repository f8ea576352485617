"""A tiny random model with all senses, for the tests of inference."""

from __future__ import annotations

import numpy as np
import torch

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.inference.api import Model
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig, ModelConfig, MultimodalModel
from mmllm.model.pointer import PointerConfig
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm_tokenizers.audio import SmallCodec
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.tiling import Tiling

RATE = 8000
IMAGE_SIZE = 16
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def make_tokenizer(
    pattern: str = "delay",
    num_codebooks: int = 3,
    sound: bool = True,
    tiling: Tiling | None = None,
    pointer: PointerRule | None = None,
    spoken_codebooks: int = 0,
) -> TokenizerFolder:
    torch.manual_seed(0)
    text = TextTokenizer.train(["a red circle above two blue squares, he said: one, two, three"] * 3, vocab_size=320)
    config = TokenizerConfig(
        image_tokens=4, image_size=IMAGE_SIZE, audio_pool=2, pattern=pattern, tiling=tiling, pointer=pointer
    )
    if not sound:
        return TokenizerFolder(text, None, config)
    codec = Codec(
        CodecConfig(
            sample_rate=RATE,
            num_filters=4,
            ratios=(8, 8),
            dimension=8,
            num_codebooks=num_codebooks,
            codebook_size=12,
            spoken_codebooks=spoken_codebooks,
        )
    )
    codec.eval()
    return TokenizerFolder(text, SmallCodec(codec), config)


def make_model(tokenizer: TokenizerFolder, sight: bool = True, tie_word_embeddings: bool = True) -> MultimodalModel:
    """Random weights, far enough from nothing that answers differ in length."""
    torch.manual_seed(1)
    vocabulary, rule = tokenizer.vocabulary, tokenizer.config.pointer
    audio = AudioConfig(
        vocabulary.num_codebooks,
        vocabulary.codebook_size,
        8,
        AudioProjectorConfig(pool=2, num_hidden_layers=1, kernel_size=3),
        None if rule is None else PointerConfig(before=1, after=2, max_age=5, max_advance=rule.max_advance),
        heard_codebooks=tokenizer.config.heard_codebooks,
    )
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=vocabulary.size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
            moe_layers=(1,),
            tie_word_embeddings=tie_word_embeddings,
        ),
        vision=VisionConfig(CLIP) if sight else None,
        image_projector=ImageProjectorConfig(
            max_tiles=tokenizer.config.tiling.max_tiles if tokenizer.config.tiling else 1
        ),
        audio=audio if vocabulary.num_codebooks else None,
        loss=LossConfig(ctc=0.0 if rule is None else 0.3),
    )
    model = MultimodalModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25)
    return model.eval()


def make(pattern: str = "delay", num_codebooks: int = 3, pointer: PointerRule | None = None) -> Model:
    tokenizer = make_tokenizer(pattern, num_codebooks, pointer=pointer)
    return Model(make_model(tokenizer), tokenizer, generation=GenerationConfig(max_new_tokens=12, max_seconds=0.2))


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(count)]


def sounds(count: int) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    lengths = [700 + 613 * (number % 4) for number in range(count)]
    return [(rng.normal(0, 0.2, length).astype(np.float32), RATE) for length in lengths]
