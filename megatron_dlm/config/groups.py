"""Options of a run.

One field is one flag (`--tensor-model-parallel-size`), one YAML key (`tensor_model_parallel_size`)
and one docstring, the flag's help text. A default is written here and nowhere else. A name is
unique over all groups, which exist for the code and for the headings of `--help`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from megatron_dlm.config.fields import FIXED
from megatron_dlm.config.objective_traits import ObjectiveName, StateSelection
from megatron_dlm.config.parameter_groups import ParameterGroup, ParamGroupPreset
from megatron_dlm.ranges import (
    ABOVE_ZERO,
    AT_LEAST_HALF,
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    BETWEEN_ZERO_AND_ONE,
    FRACTION,
    PROBABILITY,
    TEMPERATURE,
)
from megatron_dlm.rollout.decoding_options import StrategyOptions
from megatron_dlm.types.diffusion_kind import ContextAttention, DiffusionKind
from megatron_dlm.types.divergence_spec import DivergenceSpec

Schedule = Literal["constant", "linear", "cosine"]
RecomputeModule = Literal["core_attn", "mlp", "moe", "layernorm"]
TrainOn = Literal["last", "all"]
MaskEmbeddingInit = Literal["keep", "mean"]
LongPrompts = Literal["error", "drop", "truncate"]
LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
RolloutGraphs = Literal["auto", "on", "off"]
EmptyMask = Literal["redraw", "mask_one"]


@dataclass(frozen=True)
class CheckpointOptions:
    """What is read of a checkpoint, in training as in the tools."""

    load: str | None = None
    """Weights: a Hugging Face folder, a run folder (its latest checkpoint) or an iter_* folder."""
    verify_checkpoint: bool = True
    """Compare files of a Megatron checkpoint with its manifest first, large ones too."""
    tokenizer: str | None = None
    """Folder of tokenizer.json or tokenizer.model and the chat template (default: the weights')."""


@dataclass(frozen=True)
class ModelConfig(CheckpointOptions):
    """Model: weights, architecture and how a layer computes."""

    load: str | None = None
    """Weights to start from: a Hugging Face folder, a Megatron checkpoint, or a run folder (which
    goes on unless --finetune is given). It stays the same when the run in --save is resumed."""
    finetune: bool = False
    """Take only the weights from --load: optimizer, schedules and data position start afresh."""
    block_size: Annotated[int, AT_LEAST_ONE, FIXED] = 4
    """Tokens denoised together; blocks are counted from the first prompt token."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: flex (FlexAttention, CUDA), sdpa (any device), or auto (flex on CUDA)."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers from Megatron-Core alone (local) or from Transformer Engine (must be installed)."""
    bf16: Annotated[bool, FIXED] = False
    """Compute in bfloat16 with float32 master weights; without it everything is float32."""
    fp8_format: Annotated[Literal["e4m3", "hybrid"] | None, FIXED] = None
    """Multiply in 8-bit floats in linear layers and experts, not in attention, router, output layer
    or teacher: e4m3, or hybrid (gradients in e5m2). Needs --bf16 and Transformer Engine."""
    fp8_recipe: Annotated[Literal["delayed", "tensorwise", "mxfp8", "blockwise"], FIXED] = "delayed"
    """Scales of FP8: of a tensor, from its last values (delayed) or its own (tensorwise), or of
    parts of it, 128 wide (blockwise, Hopper) or 32 (mxfp8, Blackwell)."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, selective (--recompute-modules) or full (whole layers)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """What selective recomputes, by Megatron's names: core_attn, mlp, moe (experts), layernorm."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full: all in chunks of --recompute-num-layers (uniform), or only a stage's first (block)."""
    recompute_num_layers: Annotated[int, AT_LEAST_ONE] = 1
    """Layers in a recomputed chunk (uniform) or recomputed layers a stage (block)."""
    model_config: str | None = None
    """Hugging Face config.json to build a model with random weights from, when --load is absent."""
    init_method_std: Annotated[float | None, ABOVE_ZERO] = None
    """Standard deviation of random weights (default: initializer_range of config.json)."""
    mask_embedding_init: MaskEmbeddingInit | None = None
    """Input embedding of MASK when an autoregressive model, which never saw that token, is
    converted: keep its row, or the mean of all other rows (default: mean where it is not trained,
    with --param-group-preset rnd1 or --lora-rank, else keep)."""


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: low-rank adapters that are trained in place of the weights."""

    lora_rank: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Train adapters of this rank on frozen weights; all that reads the result gets them merged."""
    lora_alpha: Annotated[float | None, ABOVE_ZERO, FIXED] = None
    """An adapter is scaled by this over --lora-rank (default: --lora-rank)."""
    lora_dropout: Annotated[float, BELOW_ONE, FIXED] = 0.0
    """Probability with which an input of an adapter is dropped in training."""
    lora_target_modules: Annotated[tuple[LoRATarget, ...], FIXED] = get_args(LoRATarget)
    """Layers with an adapter, by Megatron's names: attention and feed-forward (all experts')."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism: how the model and the batch are spread over processes."""

    tensor_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that share every layer (TP)."""
    pipeline_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Pipeline stages that share the layers (PP)."""
    num_virtual_stages_per_pipeline_rank: Annotated[int, AT_LEAST_ONE] = 1
    """Model chunks of a pipeline stage (virtual stages): a row passes all stages once for each, so
    that less of an update goes by while the pipeline fills and drains."""
    context_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that share the tokens of each row of an update and of the teacher (CP), for long
    responses; rollouts and evaluations as --rollout-context-parallel says."""
    expert_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that share the experts of a mixture-of-experts layer (EP)."""
    expert_tensor_parallel_size: Annotated[int | None, AT_LEAST_ONE] = None
    """Processes that share one expert (default: --tensor-model-parallel-size)."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence."""
    use_distributed_optimizer: Annotated[bool, FIXED] = False
    """Shard optimizer state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel processes while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; needs both of the options above."""
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach experts on other processes: alltoall, or flex (DeepEP, must be
    installed)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo), cuda (NCCL), or auto: cuda where there is one."""
    distributed_timeout_minutes: Annotated[int, AT_LEAST_ONE] = 10
    """Minutes without progress, in a collective or elsewhere in training, until a run is ended."""
    watch_ranks: bool = True
    """Let processes watch each other: one that dies ends all in seconds, a stalled one is named."""
    stall_minutes: Annotated[float, ABOVE_ZERO] = 5.0
    """Minutes without progress after which a process is named, with its phase and stack."""


@dataclass(frozen=True)
class DataConfig:
    """Data: prompts, corpora and their order."""

    prompts: str | None = None
    """Prompts for rollouts: JSONL, one object a line with `messages` (chat) or `prompt`; or
    Parquet, Arrow, a pattern, hf://datasets/owner/name, or a mixture of these in a YAML file."""
    train_data: str | None = None
    """Prompts with answers, in such files too: `prompt` and `response`, or whole `messages`."""
    train_on: Annotated[TrainOn, FIXED] = "last"
    """Turns of the assistant that are trained on: the last one, or all, each as its own example."""
    data_path: str | None = None
    """Pretraining corpus: prefix of the .bin and .idx file that megatron-dlm preprocess wrote."""
    seq_length: Annotated[int, AT_LEAST_ONE, FIXED] = 2048
    """Tokens of a corpus window, a sample of --global-batch-size; its documents stay separate."""
    max_prompt_length: Annotated[int, AT_LEAST_ONE] = 1024
    """Longest prompt in tokens, chat template included."""
    long_prompts: Annotated[LongPrompts, FIXED] = "error"
    """Longer prompts are an error, are left out (drop), or lose their beginning (truncate)."""
    data_cache_path: str | None = None
    """Folder that all processes see, for records that are tokenised once (default: data_cache in
    that of --save for several processes, else none)."""
    seed: Annotated[int, AT_LEAST_ZERO, FIXED] = 1234
    """Seed of everything random: weights, order of the data, sampling, state selection."""
    shuffle: Annotated[bool, FIXED] = True
    """Visit the data in a new random order every epoch instead of the file's order."""


@dataclass(frozen=True)
class TemplateConfig:
    """Template: how a record becomes a prompt, and what its domain changes."""

    domain_field: str = "domain"
    """Field of a record that names its domain, for the options by domain."""
    prompt_suffix_by_domain: Annotated[dict[str, str], FIXED] = field(default_factory=dict)
    """Text after the last user message (or `prompt`) by domain, in JSON; `default`: all others."""
    max_response_length_by_domain: Annotated[dict[str, int], AT_LEAST_ONE] = field(
        default_factory=dict
    )
    """Lower --max-response-length by a record's domain, in JSON; `default`: all other domains."""
    chat_template_kwargs: Annotated[dict[str, Any], FIXED] = field(default_factory=dict)
    """Variables for the chat template, e.g. {"enable_thinking": false}; those of a record win."""


@dataclass(frozen=True)
class DecodingConfig(StrategyOptions):
    """Decoding: how tokens are drawn and kept, in training as in the tools that generate."""

    temperature: Annotated[float, TEMPERATURE] = 1.0
    """Softmax temperature of the draws; 0 takes the most likely token."""
    top_k: Annotated[int, AT_LEAST_ZERO] = 0
    """Draw among the k most likely tokens only; 0 is off."""
    top_p: Annotated[float, PROBABILITY] = 1.0
    """Draw among the most likely tokens that together hold this probability; 1 is off."""
    max_running_requests: Annotated[int, AT_LEAST_ONE] = 64
    """Sequences that a data-parallel process decodes at once, if the KV cache has room for them."""
    max_total_tokens: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens that the KV cache of a data-parallel process has room for, in pages of 32; prompts
    wait for them (default: enough for --max-running-requests, up to 80 % of free GPU memory). With
    --rollout-context-parallel tokens each process has so many of all sequences."""
    chunked_prefill_size: Annotated[int, AT_LEAST_ONE] = 8192
    """Most prompt tokens of a forward; longer ones are prefilled in pieces, while others decode."""
    rollout_graphs: RolloutGraphs = "auto"
    """Record the layers of a decoding step once and replay them: CUDA graphs, on a CPU PyTorch's
    operations. auto: on a CPU after some hundred forwards, where that is possible; on: at once."""
    decoding_groups: Annotated[int | None, AT_LEAST_ONE] = None
    """Groups that the sequences in decoding are split into, for stages of a pipeline to work on at
    once; fewer than stages leave some idle (default: --pipeline-model-parallel-size)."""
    rollout_context_parallel: Literal["sequences", "tokens"] = "sequences"
    """What ranks of --context-parallel-size share in decoding: whole sequences, each with those of
    its own; or the tokens, keys and values of every sequence (tokens: for prompts and responses too
    long for one rank's KV cache)."""


@dataclass(frozen=True)
class RolloutConfig(DecodingConfig):
    """Rollout: block-diffusion generation by the student."""

    num_rollouts: Annotated[int | None, AT_LEAST_ONE] = None
    """Rollouts to do, all of --rollout-batch-size prompts (alternative: --num-epochs)."""
    rollout_batch_size: Annotated[int, AT_LEAST_ONE, FIXED] = 128
    """Prompts per rollout, over all data-parallel processes."""
    shared_rollout_queue: bool = True
    """Let replicas take prompts as they have room, not equal shares at once. Off, a run
    repeats itself even in bf16, where rounding depends on what is decoded together."""
    partial_rollouts: Annotated[float, AT_LEAST_HALF] = 1.0
    """Share of the responses in decoding that a rollout waits for (1: all); the others go on in the
    next one, with its weights. It still trains on --rollout-batch-size responses."""
    max_response_rollouts: Annotated[int, AT_LEAST_TWO] = 4
    """Rollouts that a response may take part in; the last one waits for its end."""
    max_response_length: Annotated[int, AT_LEAST_ONE] = 1024
    """Longest response in tokens; the end point of the length schedule."""
    min_response_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Response limit in tokens at the first rollout (linear and cosine schedules)."""
    response_length_schedule: Schedule = "constant"
    """How the response limit grows from --min-response-length to --max-response-length."""
    response_length_warmup_rollouts: Annotated[int, AT_LEAST_ZERO] = 0
    """Rollouts until the response limit has reached --max-response-length."""
    final_dynamic_threshold: Annotated[float | None, PROBABILITY] = None
    """Confidence threshold at the end of a linear or cosine schedule."""
    dynamic_threshold_schedule: Schedule = "constant"
    """How it goes from --dynamic-threshold to --final-dynamic-threshold (cosine: slow at first)."""
    dynamic_threshold_hold_rollouts: Annotated[int, AT_LEAST_ZERO] = 0
    """Rollouts with --dynamic-threshold before it starts to change."""
    dynamic_threshold_rollouts: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Rollouts over which it then changes; later ones have the final value (default: all left)."""
    max_tries: Annotated[int, AT_LEAST_ONE] = 8
    """Most responses to a prompt until --reward rates one right, where responses are verified."""
    teacher_response_fraction: Annotated[float, FRACTION] = 0.0
    """Share of a rollout's responses that are the teacher's, not the student's; at first."""
    final_teacher_response_fraction: Annotated[float, FRACTION] = 0.0
    """That share at the end of a linear or cosine schedule."""
    teacher_response_fraction_schedule: Schedule = "constant"
    """How the share goes from --teacher-response-fraction to --final-teacher-response-fraction."""
    teacher_response_fraction_rollouts: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Rollouts over which it changes; later ones have the final share (default: all of the run)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective: what a training row looks like and what is supervised."""

    objective: Annotated[ObjectiveName, FIXED] = "opdlm"
    """opdlm: on-policy distillation of a block-diffusion student from an autoregressive teacher;
    opdlm_off: the same at random states of its rollouts; off_policy: at random states of the
    teacher's responses; sft: block-diffusion cross entropy on --train-data, or the teacher's
    responses to --prompts; scp: continual pretraining on --data-path under full attention with
    shifted predictions (RND1); next_token: autoregressive training on --train-data or --data-path;
    d_opsd: self-distillation of a diffusion model, whose teacher sees later tokens."""
    state_selection: StateSelection | None = None
    """Denoising states that are trained on. opdlm: one step of each block (per_block, its default)
    or of the whole trajectory (global), or every step (all); d_opsd: every step of all blocks but
    the last (all); other block-diffusion objectives: random masks (random)."""
    empty_mask: EmptyMask = "redraw"
    """How to treat a block of a random state in which no supervised token was masked: draw it again
    (redraw), or mask one of its tokens (mask_one; with weights 1/t the loss would have no mean)."""
    attention_pattern: Annotated[Literal["full", "causal"] | None, FIXED] = None
    """What a token sees under scp: all of its document (full), or earlier tokens only (causal: the
    first model of RND1's grafting, for a second run with --finetune) (default: full)."""
    context_attention: Annotated[ContextAttention, FIXED] = DiffusionKind.context_attention
    """What finished tokens see of each other in block diffusion: their block and those before
    (block_causal), or earlier tokens only (causal: the model keeps an autoregressive mode)."""
    causal_loss_weight: Annotated[float, AT_LEAST_ZERO, FIXED] = 1.0
    """Weight of the loss that keeps the autoregressive mode of --context-attention causal: the same
    loss where finished tokens predict the next one, as a mean over a response; 0 leaves it out."""
    attention_annealing_iters: Annotated[int, AT_LEAST_ZERO, FIXED] = 0
    """Optimizer steps over which scp goes from causal to full attention: a later token is seen with
    a probability that rises from 0 to 1 (as in DiffuLLaMA). 0: full from the first step."""
    loss_weighting: Literal["inverse_t", "none"] = "inverse_t"
    """Weight of a token under sft and scp: 1 (none), or 1/t where masked with probability t."""
    supervise_eos: bool = True
    """Supervise the end-of-sequence token of a response as well."""
    loss_normalization: Literal["token", "row_mean"] = "token"
    """Divide by the supervised tokens of the global batch (token; scp: all that could be masked;
    d_opsd: its states), or average each row's mean over the rows (row_mean)."""
    reward: str = "exact_match"
    """How a response is rated where it is verified, and on --eval-prompts: exact_match,
    math_verify, choice, instructions, code_tests, countdown, sudoku, or package.module:function."""
    unsafe_code_execution: bool = False
    """Let the reward code_tests run code, which can do what you can, where nothing isolates it."""


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation: the teacher and the divergence from it."""

    teacher_load: str | None = None
    """Frozen teacher, a Hugging Face folder or Megatron checkpoint: an autoregressive model
    (default: --load), for d_opsd a copy of the student (default: the student without adapters)."""
    teacher_responses: str | None = None
    """Folder of the teacher's responses to --prompts; missing ones that are needed are generated
    before training, with the rollout's options (default: teacher_responses in the run folder)."""
    cache_teacher_targets: bool = False
    """Store the teacher's --divergence-top-k tokens of its responses once, and train without it."""
    offload_teacher: bool = False
    """Keep the teacher's weights in host memory while unused (output layer: in rollouts only)."""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, or a weighted sum such as forward_kl:0.5,reverse_kl:0.5."""
    jsd_beta: Annotated[float, BETWEEN_ZERO_AND_ONE] = DivergenceSpec.jsd_beta
    """Weight of the teacher in the mixture of jsd."""
    divergence_top_k: Annotated[int, AT_LEAST_ZERO] = 0
    """Compare only the teacher's k most likely tokens; 0 compares the full vocabulary."""
    divergence_tail: Literal["bucket", "ignore"] = "bucket"
    """With --divergence-top-k, the other tokens: one more class (bucket), or none (ignore)."""
    divergence_chunk_size: Annotated[int | None, AT_LEAST_ONE] = None
    """Supervised tokens whose logits are in memory at a time (default: as many as memory
    allows)."""


@dataclass(frozen=True)
class SelfDistillationConfig:
    """Self-distillation (d_opsd): what the teacher sees, and where the student is supervised."""

    reveal_fraction: Annotated[float, FRACTION] = 0.25
    """Share of positions in later blocks at which the teacher sees the student's final tokens."""
    positions_per_state: Annotated[int, AT_LEAST_ONE] = 2
    """Masked positions of a block that are supervised: where the teacher is most certain."""
    position_ranking: Literal["probability", "logit"] = "probability"
    """Measure of that certainty: the teacher's highest probability, or logit (as published)."""
    teacher_top_k: Annotated[int, AT_LEAST_ONE] = 20
    """Teacher's most likely tokens that are compared, both sides renormalised over them."""
    divergence_term_limit: Annotated[float, ABOVE_ZERO] = 0.05
    """Largest term of one vocabulary entry in a divergence; larger terms have no gradient."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: update rule, learning rates and their schedule."""

    optimizer: Annotated[Literal["adam"], FIXED] = "adam"
    """Update rule (adam is AdamW: decoupled weight decay)."""
    offload_optimizer: bool = False
    """Keep optimizer state and main weights in host memory, and no gradients, while unused."""
    lr: Annotated[float, ABOVE_ZERO, FIXED] = 1e-5
    """Peak learning rate."""
    min_lr: Annotated[float, AT_LEAST_ZERO, FIXED] = 1e-6
    """Learning rate at the end of the decay; not used by a constant schedule."""
    lr_batch_size: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Batch that all learning rates belong to: under another --global-batch-size they are
    multiplied by the square root of the ratio, as in RND1 (default: --global-batch-size)."""
    lr_decay_style: Annotated[Literal["cosine", "linear", "constant"], FIXED] = "cosine"
    """Shape of the schedule after the warm-up."""
    lr_warmup_iters: Annotated[int, AT_LEAST_ZERO, FIXED] = 0
    """Optimizer steps over which the learning rate rises from 0 to --lr."""
    lr_warmup_fraction: Annotated[float | None, FRACTION] = None
    """The same as a fraction of --lr-decay-iters, instead of --lr-warmup-iters."""
    lr_decay_iters: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Optimizer step at which --min-lr is reached (default: the number of steps of the run)."""
    weight_decay: Annotated[float, AT_LEAST_ZERO, FIXED] = 0.0
    """Decoupled weight decay; never applied to norms and biases."""
    adam_beta1: Annotated[float, BELOW_ONE, FIXED] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, BELOW_ONE, FIXED] = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Annotated[float, ABOVE_ZERO, FIXED] = 1e-8
    """Term that keeps Adam's denominator above zero."""
    clip_grad: Annotated[float, AT_LEAST_ZERO] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    param_groups: Annotated[tuple[ParameterGroup, ...], FIXED] = ()
    """Groups of parameters with settings of their own, a JSON list of {pattern, lr, min_lr,
    weight_decay}. Patterns: attention, mlp, experts, router, embedding, norm, output, default (the
    rest), or regular expressions."""
    param_group_preset: ParamGroupPreset | None = None
    """rnd1: attention at 3e-4, the rest at 1e-8, weight decay 0.1 (--lr-decay-style constant)."""


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batch sizes and length of the run."""

    micro_batch_size: Annotated[int, AT_LEAST_ONE] = 1
    """Trajectories (or corpus windows) packed into one row, the unit of a forward pass."""
    max_tokens_per_micro_batch: Annotated[int | None, AT_LEAST_ONE] = None
    """Pack an update's trajectories (and the teacher's) into as few rows of at most this many
    tokens as possible, instead of --micro-batch-size; only longer ones get a longer row."""
    global_batch_size: Annotated[int, AT_LEAST_ONE, FIXED] = 8
    """Trajectories (or corpus windows) per optimizer update, over all data-parallel processes."""
    train_iters: Annotated[int | None, AT_LEAST_ONE] = None
    """Optimizer steps of objectives without rollouts; the others derive it from --num-rollouts."""
    num_epochs: Annotated[int | None, AT_LEAST_ONE] = None
    """Passes over the data instead of --num-rollouts or --train-iters; the last batch is less."""
    epochs_per_rollout: Annotated[int, AT_LEAST_ONE, FIXED] = 1
    """Passes over the trajectories of a rollout before the next one."""
    exit_duration_in_mins: Annotated[float | None, ABOVE_ZERO] = None
    """Minutes after which a run saves and ends as on SIGTERM, with status 75: to be restarted."""
    on_divergence: str = "stop"
    """On a loss or gradient that is not finite: stop (status 3), or skip:N (up to N in a row)."""


@dataclass(frozen=True)
class HeldOutConfig:
    """Held-out data: validation loss, and accuracy on prompts."""

    valid_data_path: str | None = None
    """Held-out corpus for the validation loss of a run on --data-path, in the same format."""
    valid_data: str | None = None
    """Held-out examples for the validation loss of a run on --train-data, in the same format."""
    eval_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between validation losses on held-out data; 0: only at the end of the run."""
    eval_iters: Annotated[int, AT_LEAST_ONE] = 10
    """Global batches of held-out data for a validation loss: always the same samples and masks."""
    eval_prompts: str | None = None
    """Held-out prompts, with what --reward reads, that the student answers while it is trained."""
    eval_prompts_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between evaluations on --eval-prompts; 0: only at the end of the run."""
    eval_decodings: tuple[str, ...] = ()
    """Decoding settings of an evaluation, as of megatron-dlm evaluate --settings: static:<steps>,
    dynamic:<threshold>, dynamic:0.9@8 (block size), autoregressive, ... The first one decides which
    checkpoint is best (default: what the decoding options describe)."""
    eval_num_prompts: Annotated[int | None, AT_LEAST_ONE] = None
    """Answer only this many prompts from the beginning of the file."""
    eval_temperature: Annotated[float | None, TEMPERATURE] = None
    """Softmax temperature of an evaluation; 0: the most likely token (default: --temperature)."""
    eval_max_response_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Longest response of an evaluation in tokens (default: --max-response-length)."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging and checkpoints."""

    save: str | None = None
    """Run folder: checkpoints, metrics.jsonl, resolved configuration, TensorBoard."""
    save_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between checkpoints, up to a rollout's end; 0: by --save-interval-minutes."""
    save_interval_minutes: Annotated[float, AT_LEAST_ZERO] = 30.0
    """Minutes between checkpoints; 0: by --save-interval. The end of the run is always saved."""
    keep_checkpoints: Annotated[int, AT_LEAST_ZERO] = 0
    """Latest checkpoints to keep; 0 keeps all."""
    keep_checkpoint_every: Annotated[int, AT_LEAST_ZERO] = 0
    """With --keep-checkpoints, keep iterations that are multiples of this too; 0: no others."""
    keep_best_checkpoint: bool = False
    """With --keep-checkpoints, keep the best too: by accuracy on --eval-prompts under the first
    decoding, saved at once, else by a validation loss of every checkpoint."""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy in host memory; off: training waits."""
    measure_machine: bool = True
    """Measure matrix products and memory bandwidth at the start: `mfu` is a share of them."""
    log_interval: Annotated[int, AT_LEAST_ONE] = 1
    """Optimizer steps between two lines of progress; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well (wandb must be installed)."""
