"""Every key of a training configuration. The docstring under a field is its help text and its documentation.

The configuration holds what the user wrote. Derived numbers live in :class:`vitscale.plan.RunPlan`.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vitscale.config.bounds import NonNegative, Positive, Rate, Share, Weight
from vitscale.config.duration import Duration
from vitscale.config.evaluators import Evaluator, EvaluatorName
from vitscale.config.section import section

# Defaults of keys that only some settings of another key have a use for.
CROP_AREA = (0.05, 1.0)
CROP_ASPECT = (0.75, 1.33)
EVAL_CROP_SHARE = 0.875


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one side of a square."""
    return size if isinstance(size, tuple) else (size, size)


@section
class StorageConfig:
    """How shards are read. All of it is per rank, except the cache, which the ranks of a node share."""

    cache: Path | None = None
    """Folder on the node's own disk where parts of remote shards are kept. Without one, each window is one request to
    the storage, and nothing is written; a cache pays when a node reads the same shards in several epochs."""
    cache_gb: Annotated[float, Field(gt=0)] = 500.0
    """Gigabytes (10^9 bytes) that the cache may fill. What the order needs last makes room."""
    connections: Positive = 8
    """Reads at a time."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one request may take before it is tried again."""
    total_timeout_s: Annotated[float, Field(gt=0)] = 240.0
    """Seconds, all attempts together, after which a read is given up: its samples get substitutes, or the run stops if
    the storage as a whole is silent. Together with request_timeout_s it must be shorter than engine.timeout_s."""
    allow_pipe: bool = False
    """Allow shard sets that are read by a shell command of yours: "pipe:ssh store cat /shards/{name}"."""

    def __post_init__(self) -> None:
        if self.cache is not None and ":/" in str(self.cache):
            raise ValueError(f"cache ({self.cache}) is a URL; it must be a folder on the node's own disk")


@section
class DataConfig:
    """Where the images come from and how they are cropped."""

    train: str | dict[str, Weight]
    """The training shard set: the folder or the URL (s3://, gs://, https://) that holds its index.json. Or a mixture:
    several of them with a weight each; every global batch then has the same number of images of each set. A part of a
    set is named as in path/train[:98%] or path/train[500:1000]."""
    eval: str | None = None
    """The held-out shard set, one label per image. Without it, nothing is evaluated during training. It may be a part
    that training leaves out: path/train[98%:]."""
    image_size: Positive | tuple[Positive, Positive]
    """Input size in pixels: one side of a square, or [height, width]."""
    crop: Literal["inception", "square", "short_side"] = "inception"
    """Training crop. inception: of random area and aspect (ViT reference). square: the whole image is resized to
    crop_from without keeping its aspect, then cropped at random (BiT, arXiv 1912.11370); short_side: likewise, but with
    its aspect, so that it just covers crop_from (transfer in big_vision)."""
    crop_from: Positive | tuple[Positive, Positive] | None = None
    """Size in pixels from which square and short_side crop: one side, or [height, width]. BiT: 160 for an image_size of
    128, 448 for 384."""
    crop_area: tuple[float, float] = CROP_AREA
    """Area of the inception crop as a share of the image (ViT reference input pipeline)."""
    crop_aspect: tuple[float, float] = CROP_ASPECT
    """Width over height of the inception crop, drawn uniformly."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    eval_resize: Literal["short_side", "square"] = "short_side"
    """short_side: evaluation keeps the aspect of an image and crops the centre. square: it resizes the whole image to
    image_size (fine-tuning in the ViT and BiT papers)."""
    eval_crop_share: Annotated[float, Field(gt=0, le=1)] = EVAL_CROP_SHARE
    """With short_side, evaluation resizes the short side to image_size / eval_crop_share, then crops the centre."""
    window: Positive = 64
    """Samples that are read together and shuffled among themselves."""
    lanes: Positive | None = None
    """Stretches of the epoch that are read side by side; divides global_batch_size, which is the default.
    The shuffle pool holds lanes * window samples. In a mixture, each set has a lane for each of its slots."""
    workers: Positive = 2
    """Decoding threads per rank."""
    processes: NonNegative | None = None
    """Processes that these threads are spread over, so that they and the thread that drives the model do not wait for
    one another's interpreter lock. By default one for each of them; 0 for none but the rank's own."""
    prefetch_batches: Positive = 4
    """Micro-batches that are decoded ahead of the model."""
    read_ahead_batches: NonNegative = 8
    """Micro-batches whose windows are read before their turn to be decoded comes."""
    max_bad_samples: NonNegative = 1000
    """Unreadable samples per epoch after which the run stops."""
    max_bad_share: Share = 0.001
    """Share of unreadable samples, of the larger of one epoch and the examples seen, after which the run stops."""
    storage: StorageConfig = StorageConfig()
    max_image_pixels: Annotated[int, Field(gt=0, le=89_478_485)] = 80_000_000
    """Larger images are refused before they are decoded (decompression bombs); Pillow's own limit is the most."""

    def __post_init__(self) -> None:
        if self.train == {}:
            raise ValueError("train names no shard set; give one, or a mapping of sets to weights")
        if self.lanes is not None and isinstance(self.train, dict):
            raise ValueError(f"lanes ({self.lanes}) is for a single set; leave it out with a mixture")
        self._check_crop()
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_area must be 0 < low <= high <= 1, got [{low:g}, {high:g}]")
        low, high = self.crop_aspect
        if not 0 < low <= high:
            raise ValueError(f"crop_aspect must be 0 < low <= high, got [{low:g}, {high:g}]")

    def _check_crop(self) -> None:
        """See that each key about a crop has an effect."""
        if self.eval_resize == "square" and self.eval_crop_share != EVAL_CROP_SHARE:
            raise ValueError(
                f"eval_crop_share ({self.eval_crop_share:g}) has no effect with eval_resize square, which takes the "
                f"whole image; leave one of them out"
            )
        if self.crop == "inception":
            if self.crop_from is not None:
                raise ValueError(f"crop_from ({self.crop_from}) is for crop square and short_side; set crop, too")
            return
        if self.crop_area != CROP_AREA or self.crop_aspect != CROP_ASPECT:
            raise ValueError(f"crop_area and crop_aspect are for crop inception; leave them out with crop {self.crop}")
        if self.crop_from is None:
            raise ValueError(
                f"crop {self.crop} needs crop_from, the size in pixels to crop from: 448 for an image_size of 384, 160 "
                f"for 128 (BiT)"
            )
        if any(size < needed for size, needed in zip(both_sides(self.crop_from), self.image_hw, strict=True)):
            raise ValueError(
                f"crop_from ({self.crop_from}) is below image_size ({self.image_size}), so there is nothing to crop; "
                f"make it as large at least"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return both_sides(self.image_size)


@section
class ModelConfig:
    """A model of one of the families; keys that a family has no use for are refused unless they are left alone."""

    variant: str = "ViT-B/16"
    """As in the papers: ViT-Ti/16 ... ViT-22B/14 (size, patch side in pixels), hybrids R50+ViT-B/16 ..., T2T-ViT-7 to
    T2T-ViT-24 and T2T-ViT_t-14 ..., BiT-R50x1 ..., EfficientNet-B0 to B7 and L2."""
    num_classes: Positive
    """Outputs of the head."""
    head: Literal["classes", "masked_patches"] = "classes"
    """What is predicted: classes of the image, or, without any labels, the mean colours of masked patches (ViT paper,
    appendix B.1.2), which are 512. Goes together with loss.kind."""
    depth: Positive | None = None
    """Number of blocks, instead of the variant's."""
    embed_dim: Positive | None = None
    """Width of a token, instead of the variant's."""
    num_heads: Positive | None = None
    """Attention heads, instead of the variant's."""
    mlp_dim: Positive | None = None
    """Hidden width of the MLP, instead of the variant's."""
    pool: Literal["token", "gap", "map"] = "token"
    """What the head reads: the class token, the mean over all patches, or an attention with one learned query (Scaling
    ViT, arXiv 2106.04560); no class token but with the first."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Learned tokens without a position that are discarded at the output (arXiv 2309.16588)."""
    position: Literal["learned", "learned_2d", "sincos_2d", "factorized", "relative", "none"] = "learned"
    """Position embedding: one vector for each place, or for each row and column in half of the width (learned_2d);
    fixed sines (arXiv 2205.01580); sums of row and column vectors (factorized; NaViT, arXiv 2307.06304); learned
    offsets as a bias of the attention (relative), or none (ViT paper, appendix D.4)."""
    position_at: Literal["input", "every_block", "every_block_shared"] = "input"
    """Where it is added: once, or before every block, each its own or all the same (ViT paper, appendix D.4)."""
    attention_span: Literal["full", "axial"] = "full"
    """All tokens at once, or rows and then columns, in two blocks for each (ViT paper, appendix D.6)."""
    block: Literal["sequential", "parallel"] = "sequential"
    """MLP after attention, or beside it on one norm (ViT-22B, arXiv 2302.05442)."""
    qk_norm: Literal["none", "rms", "layer"] = "none"
    """Normalise queries and keys: without centring, as in ViT-22B, or with it; neither has a bias."""
    qkv_bias: bool = True
    """Biases of queries, keys and values; ViT-22B has none."""
    representation_layer: bool = True
    """One tanh hidden layer before the head, as in pre-training (ViT paper, section 3.1). False: linear head only."""
    head_bias: float = 0.0
    """Initial bias of the head: -10 for a sigmoid loss on thousands of classes, -6.9 on ImageNet-1k."""
    dropout: Rate = 0.0
    """Rate after every dense layer except qkv, and after adding the position embedding (ViT paper, appendix B.1)."""
    stochastic_depth: Rate = 0.0
    """Chance to drop the last block; it grows linearly from 0 at the first (AugReg, arXiv 2106.10270)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU: tanh approximation as in the JAX reference, or exact erf as in timm and Hugging Face."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of every LayerNorm: 1e-6 in the JAX reference and timm, 1e-12 in Hugging Face."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    attention: Literal["auto", "triton", "sdpa", "reference"] = "auto"
    """Attention backend: vitscale's fused kernels (on a CPU their plain arithmetic), torch's fused kernels, plain
    arithmetic everywhere, or whichever of the first two was measured to be faster on this GPU and shape."""

    @property
    def label_classes(self) -> int | None:
        """How many classes the labels of images may name; None if labels are not read."""
        return self.num_classes if self.head == "classes" else None


@section
class OptimConfig:
    """The optimizer. Weight decay is torch's: multiplied by the learning rate, applied to kernels only."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """adamw: to pre-train. sgd, with momentum: to fine-tune (ViT paper, table 4), and for BiT."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay rates of the two moments (adamw)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term that keeps the denominator away from zero (adamw)."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the last update that is made again (sgd)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of kernels; biases, LayerNorms, position embedding and class token are never decayed. With sgd it is part
    of the gradient, so it must be said: 0 to fine-tune (ViT paper, table 4), 1e-4 in BiT's pre-training."""
    head_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decay of the head's kernel instead of weight_decay (3.0 in Scaling ViT, arXiv 2106.04560)."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm to clip to."""
    ema_decay: Rate | None = None
    """Keep an exponential moving average of the weights (0.9999: over some 10,000 steps; Polyak averaging in the ViT
    paper, section 4.1). It is saved with the checkpoints, and what is evaluated during training."""

    def __post_init__(self) -> None:
        idle = {"adamw": ("momentum",), "sgd": ("betas", "eps")}[self.kind]
        if given := [name for name in idle if getattr(self, name) != getattr(OptimConfig, name)]:
            raise ValueError(f"kind {self.kind} has no use for {' and '.join(given)}; leave them out")
        if self.kind == "sgd" and self.weight_decay == OptimConfig.weight_decay:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} is meant for adamw; with kind sgd it is part of the gradient, "
                f"which momentum multiplies: set weight_decay to 0 to fine-tune, or to 1e-4 as BiT's pre-training does"
            )


@section
class ScheduleConfig:
    """Learning rate over the run (ViT paper, table 3)."""

    decay: Literal["cosine", "linear", "steps"] = "cosine"
    """Shape after the warm-up. steps: constant between milestones, at each of which it is divided by factor."""
    milestones: tuple[Share, ...] = (0.3, 0.6, 0.9)
    """With steps: shares of the whole run, warm-up included, in growing order (BiT paper, section 3.3); none of them
    keeps the learning rate constant."""
    factor: Annotated[float, Field(gt=1)] = 10.0
    """With steps: what the learning rate is divided by."""
    warmup: Duration = Duration(steps=10_000)
    """Length of the linear warm-up from 0."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end; the reference's linear decay ends at 1e-5. Not with steps."""

    def __post_init__(self) -> None:
        idle = ("final_lr",) if self.decay == "steps" else ("milestones", "factor")
        if given := [name for name in idle if getattr(self, name) != getattr(ScheduleConfig, name)]:
            raise ValueError(f"decay {self.decay} has no use for {' and '.join(given)}; leave them out")
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            shown = ", ".join(f"{share:g}" for share in self.milestones)
            raise ValueError(f"milestones must grow, got [{shown}]; sort them, each once")


@section
class LossConfig:
    """Training objective."""

    kind: Literal["softmax", "sigmoid", "masked_patches"] = "softmax"
    """softmax: one label per image. sigmoid: any number of labels, summed over classes (JFT, ImageNet-21k).
    masked_patches: softmax over the colours of corrupted patches, for model.head masked_patches."""
    label_smoothing: Rate = 0.0
    """Share of the target that is spread over all classes (softmax only)."""
    mixup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Blend neighbouring images of a batch and their labels; the share is drawn anew for each step from the
    distribution Beta(mixup, mixup). 0 does not (mixup, arXiv 1710.09412; 0.1 in BiT, 0.2 to 0.8 in AugReg)."""

    def __post_init__(self) -> None:
        if self.kind == "masked_patches" and self.mixup:
            raise ValueError(f"mixup is for the losses on classes, got {self.mixup:g} with {self.kind}")
        if self.kind != "softmax" and self.label_smoothing:
            raise ValueError(f"label_smoothing is for the softmax loss, got {self.label_smoothing:g} with {self.kind}")


@section
class InitConfig:
    """The weights that a run begins with, if not with random ones: fine-tuning. They are read once: what the run itself
    has saved comes first."""

    path: Path | None = None
    """Folder of another run, file of weights in any format of 'vitscale weights', or Hugging Face folder."""
    step: NonNegative | None = None
    """Of another run: the checkpoint to take, the newest by default."""
    weights: Literal["raw", "ema"] = "raw"
    """Of another run: its weights, or their moving average (optim.ema_decay)."""
    resize: Literal["bilinear_align_corners", "bicubic", "bicubic_antialias"] | None = None
    """How position and patch embeddings are resized to data.image_size: as in the ViT paper's code, as in DINO, T2T-ViT
    and Hugging Face, or as in timm. Implementations differ, so another size is refused unless one is named."""
    head: Literal["new", "keep"] = "new"
    """new: a head with kernel 0 and bias model.head_bias takes the place of the old one (ViT paper, section 3.2).
    keep: the old one goes on, for the same classes."""
    pre_logits: Literal["drop", "keep"] = "drop"
    """What becomes of the hidden layer before the head, if there is one: with drop, set model.representation_layer to
    false (ViT paper, appendix D.3)."""

    def __post_init__(self) -> None:
        if self.path is not None and ":/" in str(self.path):
            raise ValueError(f"path ({self.path}) is a URL; fetch the weights, and name the file or the folder")
        names = ("step", "weights", "resize", "head", "pre_logits")
        given = [name for name in names if getattr(self, name) != getattr(InitConfig, name)]
        if self.path is None and given:
            raise ValueError(f"{' and '.join(given)} without path say nothing; set path, or leave them out")


@section
class EngineConfig:
    """DeepSpeed: how the state is partitioned and in which precision the model runs."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What ZeRO partitions over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; master weights, moments and accumulated gradients are fp32 in both."""
    timeout_s: Positive = 600
    """Seconds after which a collective operation that a rank does not join is an error."""
    max_skipped_steps: Positive = 3
    """Updates in a row that may be skipped because gradients are not finite, before the run stops."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0:
            raise ValueError(
                "zero_stage 0 is refused: DeepSpeed's stage 0 has no guard against non-finite gradients, reports "
                "no gradient norm in fp32 and accumulates bf16 gradients in bf16; stage 1 costs nothing more, "
                "also on one rank: use 1, 2 or 3"
            )


@section
class CheckpointConfig:
    """When checkpoints are committed, where, and which are kept."""

    every: Duration = Duration(steps=1000)
    """Distance between two checkpoints. The last step is always committed."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which one is committed, too, if none was."""
    folder: str | None = None
    """Folder or URL (s3://, gs://) of the checkpoints, seen by all ranks; by default "checkpoints" in run."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that are kept; at least two, so that a damaged one has a predecessor."""
    keep_every: Duration | None = None
    """Besides, the first one of each stretch of this length is kept for good."""
    keep_best: NonNegative = 0
    """Besides, so many of those with the highest top-1 on data.eval are kept; then each evaluation comes with one."""
    tolerate_failures: NonNegative = 0
    """Saves in a row that may fail (a full disk) before the run stops. The last one must succeed."""


@section
class EvaluationConfig:
    """Top-1 and top-5 on data.eval during training, and whatever else is to be measured."""

    every: Duration | None = None
    """Distance between two evaluations; null evaluates after the last step only. One that would come shortly before
    the last (within a quarter of the distance) is left out."""
    evaluators: dict[EvaluatorName, Annotated[Evaluator, Field(discriminator="kind")]] = field(default_factory=dict)
    """Further evaluations by name, each with its kind (accuracy, fewshot, knn or probe), its sets and its own cadence.
    metrics.jsonl has their results under their names."""


@section
class LogConfig:
    """What is recorded while training."""

    every: Duration = Duration(steps=10)
    """Distance between two records of metrics.jsonl."""


@section
class TrainConfig:
    """One training run."""

    run: Path
    """Run folder: configuration, metrics and checkpoints. The same command continues what lies there."""
    seed: NonNegative = 0
    """Seed of initialisation, data order, augmentation and dropout."""
    duration: Duration
    """Length of the run."""
    global_batch_size: Positive
    """Images per optimizer step over all ranks. Constant over the run, whatever the number of ranks."""
    micro_batch_size: Positive
    """Images per forward pass on one rank; the gradient accumulation follows from it."""
    data: DataConfig
    model: ModelConfig
    init: InitConfig = InitConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.duration.percent is not None:
            raise ValueError("duration: percent is a share of the whole run, so give steps, epochs or examples")
        if (self.model.head == "masked_patches") != (self.loss.kind == "masked_patches"):
            raise ValueError(
                f"model.head ({self.model.head}) and loss.kind ({self.loss.kind}) do not fit: masked_patches goes with "
                f"masked_patches only; set both, or neither"
            )
        evaluated = self.data.eval is not None or self.evaluation.every is not None
        if evaluated and self.model.head == "masked_patches":
            raise ValueError(
                "data.eval and evaluation.every ask for accuracies, but model.head masked_patches tells no classes; "
                "set both to null, and measure the weights with vitscale fewshot"
            )
        heads = [name for name, each in self.evaluation.evaluators.items() if each.kind == "accuracy"]
        if heads and self.model.head == "masked_patches":
            raise ValueError(
                f"evaluation.evaluators: {', '.join(heads)} of kind accuracy needs classes, which model.head "
                f"masked_patches does not tell; take kind fewshot, knn or probe"
            )
        if self.evaluation.every is not None and self.data.eval is None:
            raise ValueError("evaluation.every is given, but there is nothing to evaluate on; set data.eval too")
        if self.checkpoint.keep_best and self.evaluation.every is None:
            raise ValueError(
                "checkpoint.keep_best needs evaluations during training; set evaluation.every and data.eval"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.loss.mixup and self.micro_batch_size % 2:
            raise ValueError(
                f"loss.mixup blends pairs of images, so micro_batch_size ({self.micro_batch_size}) must be even"
            )
        storage = self.data.storage
        if storage.total_timeout_s + storage.request_timeout_s >= self.engine.timeout_s:
            raise ValueError(
                f"data.storage.total_timeout_s ({storage.total_timeout_s:g}) and request_timeout_s "
                f"({storage.request_timeout_s:g}) together must be below engine.timeout_s ({self.engine.timeout_s}): "
                f"the other ranks wait that long for one that reads"
            )
        lanes = self.data.lanes
        if lanes is not None and self.global_batch_size % lanes:
            raise ValueError(f"data.lanes ({lanes}) must divide global_batch_size ({self.global_batch_size})")
