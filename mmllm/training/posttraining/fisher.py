"""How much the loss of data depends on each weight: the diagonal of the Fisher information, for `keep.ewc`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from mmllm.batch import PackedBatch
from mmllm.data.loading.collate import pack_documents
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.losses.batch import LossFunction
from mmllm.training.posttraining.keeping import KeepConfig
from mmllm.training.posttraining.start_weights import StartWeights
from mmllm.training.vocabulary import word_ids
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import ANSWER

log = logging.getLogger(__name__)
_NAMED = 5


def fisher_diagonal(
    parameters: Mapping[str, Tensor],
    loss_of: Callable[[PackedBatch], Tensor],
    documents: Iterable[PackedBatch],
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Tensor]:
    """The mean over documents of the squared gradient of each document's loss.

    This is the empirical Fisher information, of the documents' own targets; the Fisher information proper would draw
    them from the model (arXiv 1905.12558 on how these differ; arXiv 1612.00796 leaves it open).

    Args:
        parameters: whose gradients are taken, by name; whole, not sharded.
        loss_of: the loss of one document in nats, summed over its targets.
        documents: one document each.
        rank: this process's place among those that share the work.
        num_ranks: their number; each takes every so-manieth document, and all get the same mean.

    Raises:
        ValueError: there is no document.
    """
    squares = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
        for name, weight in parameters.items()
    }
    weights, count = list(parameters.values()), 0
    for number, batch in enumerate(documents):
        count += 1
        if number % num_ranks != rank:
            continue
        gradients = torch.autograd.grad(loss_of(batch), weights, allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square += gradient.to(square.dtype).square()
    if not count:
        raise ValueError("keep.fisher_recipe gives no document that can be read; name another recipe")
    for square in squares.values():
        if num_ranks > 1:
            dist.all_reduce(square)
        square /= count
    return squares


def single_documents(
    recipe: str, folder: TokenizerFolder, transform: ImageTransform, num_documents: int
) -> Iterator[PackedBatch]:
    """A recipe's first documents, each as a batch of its own; those that fail are named and left out.

    Raises:
        ValueError: the recipe has another tokenizer than the model.
    """
    wanted = load_recipe(recipe)
    theirs = TokenizerFolder.load(wanted.tokenizer_folder())
    if theirs.hash != folder.hash:
        raise ValueError(
            f"keep.fisher_recipe has tokenizer folder {theirs.hash[:12]} but the model's is {folder.hash[:12]}; name a "
            f"recipe with the model's tokenizer"
        )
    plan = open_plan(wanted, 1, folder)
    dataset = StepDataset(plan, folder, transform)
    items = (item for step in plan.steps() for sequence in step.sequences for item in sequence)
    errors: list[str] = []
    for document in (dataset.document(item, errors) for item in islice(items, num_documents)):
        if isinstance(document, Document):
            yield pack_documents([[document]], document.num_tokens)
    if errors:
        named = "; ".join(errors[:_NAMED])
        log.warning("keep.fisher_recipe: left out %d of %d documents: %s", len(errors), num_documents, named)


def start_fisher(
    keep: KeepConfig, start: StartWeights, folder: TokenizerFolder | None, transform: ImageTransform | None,
    ranks: tuple[int, int],
) -> dict[str, Tensor]:  # fmt: skip
    """The Fisher information of `keep.fisher_recipe` at the start's weights.

    Args:
        keep: the recipe, and how many of its documents.
        start: the weights.
        folder: the model's tokenizer.
        transform: how pictures are made; None: the model doesn't see.
        ranks: this process's place, and their number.

    Raises:
        ValueError: the recipe can't be used, or the model has no tokenizer.
    """
    if folder is None or keep.fisher_recipe is None:
        raise ValueError("keep.ewc needs the model's tokenizer; give model.init_args.tokenizer or init_from")
    documents = single_documents(
        keep.fisher_recipe, folder, transform or ImageTransform(folder.image_size), keep.fisher_documents
    )
    with start.in_place() as model, torch.enable_grad():
        config = model.config
        loss = dataclasses.replace(config.loss, source_weights=None)  # names of the training's sources, not of these
        function = LossFunction(
            dataclasses.replace(config, loss=loss),
            text_weights=word_ids(loss.word_weights, folder),
            answer_id=folder.id(ANSWER),
        )
        device = model.decoder.embed_tokens.weight.device

        def loss_of(batch: PackedBatch) -> Tensor:
            batch = batch.to(device)
            return function(model, model(batch), batch).objective

        parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return fisher_diagonal(parameters, loss_of, documents, *ranks)
