"""The one configuration schema: typed, frozen, defaults here and nowhere else. `app.config_file` reads YAML into it.

A field is scientific, and may not change when a run is resumed, unless it is marked operational.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.config_pod import PodConfig
from app.config_section import Section, operational


class PhantomConfig(Section):
    """Synthetic thorax patients, used where `data.source` is `phantoms`."""

    count: int = Field(64, ge=2, le=100_000)
    """How many phantom patients to make."""
    seed: int = Field(0, ge=0)
    """Phantom number i is a function of (seed, i)."""


class DataConfig(Section):
    """Where the patients come from and how they become cubes."""

    source: Literal["ct", "phantoms"] = "ct"
    """`ct` reads the data folder of the workspace, `phantoms` makes synthetic patients."""
    path: str | None = operational(None)
    """Data folder; null is `<workspace>/data`."""
    phantoms: PhantomConfig = PhantomConfig()
    field_of_view_mm: float = Field(384.0, ge=50, le=1000)
    """Edge of the patient-centred cube."""
    hu_window: Annotated[tuple[float, float], Field(strict=False)] = (-1000.0, 1500.0)
    """HU values are clipped to this window and mapped to [-1, 1]; the lower end may not be below -1000 (air), so that
    attenuation stays linear in the network's unit."""
    validation_fraction: float = Field(0.15, gt=0, lt=1)
    """Share of the patients held out for validation; at least one."""
    max_drr_difference: float = Field(0.35, gt=0)
    """A case whose given DRRs differ from our projector's by more than this relative L2 (after the best gain and
    offset) is refused as misaligned."""
    min_coverage: float = Field(0.3, ge=0, le=1)
    """A case whose scan covers less than this share of the field of view is refused."""
    min_lung_fraction: float = Field(0.03, ge=0, le=1)
    """A case whose lungs fill less than this share of the body is refused: not a thorax."""
    max_file_gib: float = operational(4.0, gt=0)
    """Larger volumes, declared or decoded, are refused before they are read."""

    @model_validator(mode="after")
    def _window_is_usable(self) -> Self:
        low, high = self.hu_window
        if not -1000.0 <= low < high:
            raise ValueError(f"hu_window needs -1000 <= low < high, found [{low}, {high}]")
        return self


class GeometryConfig(Section):
    """Cone-beam geometry of both views; the isocentre is the centre of the cube."""

    preset: Literal["chest_stand", "c_arm", "luna16", "custom"] = "chest_stand"
    """chest_stand: SDD 1800 / SOD 1500 mm; c_arm: 1020 / 850; luna16: 1200 / 800; custom: the two fields below."""
    source_to_detector_mm: float | None = Field(None, gt=0)
    """Along the central ray."""
    source_to_isocenter_mm: float | None = Field(None, gt=0)
    """Along the central ray; the isocentre is the centre of the cube."""
    detector_mm: float | None = Field(None, gt=0)
    """Edge of the square detector; null covers the field of view at the isocentre plus 10 %."""

    @model_validator(mode="after")
    def _custom_is_complete(self) -> Self:
        distances = (self.source_to_detector_mm, self.source_to_isocenter_mm)
        if self.preset == "custom" and None in distances:
            raise ValueError("preset custom needs source_to_detector_mm and source_to_isocenter_mm")
        if self.preset != "custom" and distances != (None, None):
            raise ValueError(f"preset {self.preset} sets the distances itself: remove them or use preset: custom")
        if None not in distances and not distances[0] > distances[1]:  # type: ignore[operator]
            raise ValueError("source_to_detector_mm must be larger than source_to_isocenter_mm")
        return self


class BackboneConfig(Section):
    """Hybrid CNN + ViT of one stage."""

    patch: int = Field(2, ge=1, le=8)
    """Edge of the voxel block that space-to-depth turns into channels."""
    widths: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (64, 128)
    """Channels of each CNN level; the grid halves after each level. Multiples of 8."""
    blocks: int = Field(2, ge=1, le=8)
    """Residual blocks per CNN level, on the way down and on the way up."""
    vit_width: int = Field(384, ge=32)
    """Channels of a token."""
    vit_depth: int = Field(8, ge=0)
    """Transformer blocks on the coarsest grid; 0 leaves a plain CNN."""
    vit_heads: int = Field(6, ge=1)
    """Attention heads."""
    xray_widths: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (32, 64, 96)
    """Channels of the 2D X-ray encoder, one level per entry; its features are lifted onto the token grid."""
    checkpoint_activations: bool = operational(False)
    """Recompute activations in the backward pass: less memory, about a third more time, the same values."""

    @model_validator(mode="after")
    def _widths_divide(self) -> Self:
        bad = [w for w in (*self.widths, *self.xray_widths) if w % 8]
        if bad:
            raise ValueError(f"widths and xray_widths must be multiples of 8, found {bad}")
        if self.vit_width % (2 * self.vit_heads):
            raise ValueError(f"vit_width {self.vit_width} must be a multiple of 2 * vit_heads {2 * self.vit_heads}")
        return self


class StageConfig(Section):
    """One diffusion model of the cascade: `stage_{resolution}`."""

    resolution: int = Field(ge=8, le=512)
    """Edge of the stage's cube in voxels."""
    backbone: BackboneConfig = BackboneConfig()
    epochs: int = Field(100, ge=1)
    """Training length. May grow on resume where `optimizer.schedule` is `constant` and `physics.weight` is 0."""
    samples_per_epoch: int = Field(512, ge=1)
    """How many samples are an epoch, whatever the number of patients."""
    batch: int = Field(8, ge=1)
    """Samples per optimizer step."""
    micro_batch: int | None = operational(None, ge=1)
    """Samples per forward pass; null is the whole batch. Gradients accumulate to `batch`."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of AdamW, after the warm-up."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Largest decay of the averaged weights, which validation, sampling and the next stage use."""
    sampler_steps: int = Field(8, ge=1, le=1000)
    """Steps of the sampler at the hand-over to the next stage and in the pictures."""
    sart_sweeps: int = Field(2, ge=0, le=50)
    """SART sweeps on the predicted volume in each sampler step."""
    prior_sweeps: int = Field(4, ge=0, le=100)
    """SART sweeps from the training mean that make the first stage's conditioning volume; 0 is the mean itself."""

    @property
    def name(self) -> str:
        """`stage_{N}`, the name in tags and file names."""
        return f"stage_{self.resolution}"

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one is full as well."""
        return -(-self.samples_per_epoch // self.batch)

    @model_validator(mode="after")
    def _grid_divides(self) -> Self:
        factor = self.backbone.patch * 2 ** len(self.backbone.widths)
        if self.resolution % factor or self.resolution // factor < 2:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of {factor} and at least {2 * factor} "
                f"(patch {self.backbone.patch} times 2 for each of {len(self.backbone.widths)} widths)"
            )
        halvings = 2 ** (len(self.backbone.xray_widths) - 1)
        if factor % halvings:
            raise ValueError(
                f"xray_widths has {len(self.backbone.xray_widths)} levels; the X-ray encoder can halve at most "
                f"{factor.bit_length() - 1} times before it reaches the token grid ({factor} voxels per token)"
            )
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} must be a multiple of micro_batch {self.micro_batch}")
        return self


class DiffusionConfig(Section):
    """Variance-preserving diffusion with a shifted cosine schedule."""

    log_snr_min: float = -10.0
    """log SNR at t = 1, nearly pure noise."""
    log_snr_max: float = 10.0
    """log SNR at t = 0, nearly clean."""
    shift_resolution: int = Field(32, ge=1)
    """Cube edge at which the cosine schedule is unshifted; at N it moves by 2 log(shift_resolution / N)."""
    loss_weight_max: float = Field(5.0, ge=1)
    """The loss weight is min(1 + SNR, this)."""
    view_dropout: float = Field(0.1, ge=0, lt=0.5)
    """Chance of each view to be hidden from a training sample; never both."""
    lowres_noise_max: float = Field(0.3, ge=0, le=1)
    """Noise augmentation of the previous stage's volume in training: s ~ U(0, this)."""
    lowres_real_share: float = Field(0.5, ge=0, le=1)
    """Share of the training samples whose low-resolution volume is the previous stage's own output."""

    @model_validator(mode="after")
    def _log_snr_is_ordered(self) -> Self:
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(f"log_snr_min {self.log_snr_min} must be below log_snr_max {self.log_snr_max}")
        return self


class PhysicsConfig(Section):
    """Weight of the projection loss: 0, then a linear ramp by epoch, then constant."""

    weight: float = Field(0.02, ge=0)
    """Final weight; validation uses it throughout."""
    ramp_start: float = Field(0.5, ge=0, le=1)
    """Share of the stage's epochs after which the ramp begins."""
    ramp_end: float = Field(0.9, ge=0, le=1)
    """Share of the stage's epochs at which the final weight is reached."""

    @model_validator(mode="after")
    def _ramp_is_ordered(self) -> Self:
        if self.ramp_start > self.ramp_end:
            raise ValueError(f"ramp_start {self.ramp_start} must not be above ramp_end {self.ramp_end}")
        return self


class AugmentationConfig(Section):
    """Random changes of training cases; 0 turns each off. Validation and sampling see the cases as they are.

    Radiographs are rendered anew from a moved patient, also where the data folder gave them. There is no mirroring: the
    heart lies on the left and the liver on the right in all but about one of ten thousand people.
    """

    rotation_deg: float = Field(0.0, ge=0, le=45)
    """Largest rotation about a random axis through the centre of the cube; the angle is U(-this, this)."""
    scale: float = Field(0.0, ge=0, le=0.5)
    """The patient grows by a factor 1 + U(-this, this), at the same HU."""
    translation_mm: float = Field(0.0, ge=0, le=200)
    """Shift along each axis by U(-this, this)."""
    xray_noise: float = Field(0.0, ge=0, le=1)
    """Quantum noise of the radiographs that the network sees: standard deviation of a line integral p is this times
    exp(p / 2), in a pixel of the finest stage."""
    xray_gain: float = Field(0.0, ge=0, le=0.5)
    """Each radiograph's line integrals are multiplied by 1 + U(-this, this), as if its gain were wrong."""

    @property
    def moves(self) -> bool:
        """Whether patients are moved."""
        return max(self.rotation_deg, self.scale, self.translation_mm) > 0

    @property
    def distorts(self) -> bool:
        """Whether radiographs are measured with errors."""
        return max(self.xray_noise, self.xray_gain) > 0


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to `final_learning_rate_ratio`, or constant."""
    warmup_steps: int = Field(200, ge=0)
    """Steps of the linear rise from 0."""
    final_learning_rate_ratio: float = Field(0.02, ge=0, le=1)
    """Share of the learning rate at the end of the cosine."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.99)
    """Decay of AdamW's two averages."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled, as in AdamW."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest L2 norm of the gradient of a step."""


class ValidationConfig(Section):
    """What is measured at the end of each epoch."""

    cases: int = Field(16, ge=1)
    """At most this many held-out cases, the first of the split."""
    noise_levels: int = Field(4, ge=1, le=64)
    """Fixed noise levels per case, evenly spread over the schedule."""
    sampled_cases: int = operational(4, ge=1, le=256)
    """Held-out cases that are sampled: PSNR, gain over c, X-ray use and projection error are their means."""
    sampler_steps: int = operational(4, ge=1, le=1000)
    """Steps of the sampler for them, fewer than at the hand-over."""
    pictures: int = operational(2, ge=0, le=16)
    """How many of them are shown."""


class LoggingConfig(Section):
    """What is written where, and how often."""

    log_every_n_steps: int = operational(50, ge=1)
    """Steps between two points of the per-step curves; the first step is always logged."""
    images_every_n_epochs: int = operational(1, ge=1)
    """Epochs between two sets of pictures."""
    flush_s: float = operational(5.0, gt=0, le=15)
    """Points reach the event file at least this often."""
    telemetry_every_s: float = operational(10.0, gt=0, le=600)
    """Seconds between two readings of GPUs and machine, which a thread of their own makes."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    save_every_n_epochs: int = operational(5, ge=1)
    """Epochs between two `_epoch_{N}.pt`."""
    keep_last_n_checkpoints: int | None = operational(None, ge=1)
    """How many `_epoch_{N}.pt` of a stage are kept; null keeps all."""
    save_every_s: float = operational(60.0, gt=0)
    """Seconds between two rolling saves, where they may cost that much."""
    max_overhead: float = operational(0.02, gt=0, le=1)
    """Share of the training time that rolling saves may cost; the interval grows until they do not cost more."""
    min_free_gib: float = operational(0.2, ge=0)
    """Room that a save leaves on the volume; with less it is put off, and training goes on."""


class ComputeConfig(Section):
    """The machine that the run needs."""

    device: Literal["auto", "cuda", "cpu"] = operational("auto")
    """`auto` takes a GPU where there is one; `cuda` refuses to start without."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = operational("auto")
    """On a machine, each with a GPU of its own: `auto` is one per GPU, as far as `batch` can be divided; 1 on a CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: fp32 on a CPU, bf16 on a GPU that has it, else fp16 with a scaler. A resumed run keeps its own."""
    threads: int = Field(2, ge=1, le=256)
    """CPU threads of the arithmetic; part of the result, bit for bit."""
    deterministic: bool = operational(True)
    """On a GPU, kernels that give the same bits each time: without them a resumed run differs from an undisturbed one
    in its last bits; false takes the fastest ones, and cuDNN tries them out."""
    workers: int = operational(0, ge=0, le=64)
    """Processes that load cases; they only load, so their number does not change the result."""
    rehearse: Literal["auto", "always", "never"] = operational("auto")
    """Take each stage through a step, a validation and a checkpoint at full size before the first step; `auto` does so
    on a GPU, once for each kind of card."""
    hang_after_s: float = operational(900.0, gt=0)
    """Seconds without a sign of life after which the supervisor ends the trainer and starts it again; longer than the
    longest single operation, such as the start, a micro-batch or the write of a checkpoint."""


class WandbConfig(Section):
    """Weights & Biases: on when WANDB_API_KEY is set or WANDB_MODE is offline."""

    project: str = operational("hybrid-vit-cascade")
    """Project at Weights & Biases."""
    entity: str | None = operational(None)
    """User or team; null is the default of the API key."""
    images: bool = operational(False)
    """Send the pictures of held-out patients too, which TensorBoard has anyway."""
    checkpoints: bool = operational(False)
    """Send each new `_best.pt` and `_final.pt` as an artifact; offline, those of finished stages."""


class Config(Section):
    """A run."""

    run_name: str | None = operational(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Folder below `checkpoints/`; null is `checkpoints/` itself. RUN_NAME overrides it."""
    init_from: str | None = operational(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Another run of the workspace, trained on the same cases, whose finished stages this run takes over."""
    seed: int = Field(0, ge=0)
    """Everything random in a run is a function of it."""
    data: DataConfig = DataConfig()
    geometry: GeometryConfig = GeometryConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False, min_length=1)] = tuple(
        StageConfig(resolution=edge) for edge in (64, 128, 256)
    )
    """Coarse to fine; each edge is a multiple of the one before."""
    diffusion: DiffusionConfig = DiffusionConfig()
    physics: PhysicsConfig = PhysicsConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()
    wandb: WandbConfig = WandbConfig()
    pod: PodConfig = PodConfig()

    @model_validator(mode="after")
    def _stages_ascend(self) -> Self:
        edges = [stage.resolution for stage in self.stages]
        for coarse, fine in pairwise(edges):
            if fine <= coarse or fine % coarse:
                raise ValueError(f"stages must ascend, each a multiple of the one before: found {edges}")
        if any(edges[-1] % edge for edge in edges):
            raise ValueError(f"every stage must divide the finest: found {edges}")
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`, such as `stage_64`."""
        return next(stage for stage in self.stages if stage.name == name)

    def without_paths(self) -> Self:
        """The same run without the paths of a machine, which may hold a patient's name: for files that are shared."""
        return self.model_copy(update={"data": self.data.model_copy(update={"path": None})})

    def first_global_step(self, stage: StageConfig) -> int:
        """Optimizer steps of all stages before `stage`."""
        return sum(other.epochs * other.steps_per_epoch for other in self.stages[: self.stages.index(stage)])
