"""Options of a run.

One field is one command-line flag (`--tensor-model-parallel-size`), one YAML key
(`tensor_model_parallel_size`) and one docstring, the flag's help text; its type is one that
`megatron_dlm.config.coercion` reads. A default is written here and nowhere else. A name is unique
over all groups: they exist for the code (`config.parallel.tensor_model_parallel_size`) and for the
headings of `--help`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from megatron_dlm.config.divergence_spec import DivergenceSpec
from megatron_dlm.config.marks import (
    ABOVE_ZERO,
    AT_LEAST_HALF,
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    BETWEEN_ZERO_AND_ONE,
    FIXED,
    FRACTION,
    PROBABILITY,
    TEMPERATURE,
)
from megatron_dlm.config.objective_traits import ObjectiveName, StateSelection
from megatron_dlm.config.parameter_groups import ParameterGroup, ParamGroupPreset
from megatron_dlm.rollout.decoding_options import StrategyOptions

Schedule = Literal["constant", "linear", "cosine"]
RecomputeModule = Literal["core_attn", "mlp", "moe", "layernorm"]
TrainOn = Literal["last", "all"]
MaskEmbeddingInit = Literal["keep", "mean"]
LongPrompts = Literal["error", "drop", "truncate"]
LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
EmptyMask = Literal["redraw", "mask_one"]


@dataclass(frozen=True)
class CheckpointOptions:
    """What is read of a checkpoint, in training as in the tools."""

    load: str | None = None
    """Weights: a Hugging Face folder, a run folder (its latest checkpoint) or an iter_* folder."""
    verify_checkpoint: bool = True
    """Compare every file of a Megatron checkpoint with its manifest before it is loaded; without
    it only small files and sizes, which takes no time at any size."""
    tokenizer: str | None = None
    """Folder with tokenizer.json or a SentencePiece tokenizer.model, and the chat template
    (default: the one beside the weights)."""


@dataclass(frozen=True)
class ModelConfig(CheckpointOptions):
    """Model: weights, architecture and how a layer computes."""

    load: str | None = None
    """Weights to start from: a Hugging Face folder, a Megatron checkpoint, or a run folder (its
    latest checkpoint; that run goes on unless --finetune is given). It stays the same when the run
    in --save is resumed."""
    finetune: bool = False
    """Take only the weights from --load: optimizer, schedules and data position start afresh."""
    block_size: Annotated[int, AT_LEAST_ONE, FIXED] = 4
    """Tokens denoised together; blocks are counted from the first prompt token."""
    attention_backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: flex (FlexAttention, CUDA), sdpa (reference, any device), or auto (flex on
    CUDA, sdpa on CPU)."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers from Megatron-Core alone (local) or from Transformer Engine (must be installed)."""
    bf16: Annotated[bool, FIXED] = False
    """Compute in bfloat16 with float32 master weights; without it everything is float32."""
    fp8_format: Annotated[Literal["e4m3", "hybrid"] | None, FIXED] = None
    """Multiply in 8-bit floats, in updates and rollouts: the layers' linear layers and experts, not
    attention, router, output layer or teacher. e4m3, or hybrid (gradients in e5m2). Needs --bf16
    and --transformer-impl transformer_engine."""
    fp8_recipe: Annotated[Literal["delayed", "tensorwise", "mxfp8", "blockwise"], FIXED] = "delayed"
    """Scales of FP8: of a tensor, from its last values (delayed) or its own (tensorwise), or of
    parts of it, 128 wide (blockwise, Hopper) or 32 (mxfp8, Blackwell)."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, selective (--recompute-modules) or full (whole layers)."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """Parts of a layer that selective recomputation recomputes, by Megatron's names: core_attn, mlp
    (of dense layers), moe (of layers with experts), layernorm (with Transformer Engine)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full recomputation: uniform (chunks of --recompute-num-layers layers) or block (only
    the first --recompute-num-layers layers of a pipeline stage)."""
    recompute_num_layers: Annotated[int, AT_LEAST_ONE] = 1
    """Layers in a recomputed chunk (uniform) or recomputed layers a stage (block)."""
    model_config: str | None = None
    """Hugging Face config.json to build a model with random weights from, when --load is absent."""
    init_method_std: Annotated[float | None, ABOVE_ZERO] = None
    """Standard deviation of randomly initialised weights (default: initializer_range of the
    model's config.json)."""
    mask_embedding_init: MaskEmbeddingInit | None = None
    """Initial input embedding of MASK in a conversion of an autoregressive model, which has never
    seen that token: the row of the checkpoint (keep) or the mean of all other rows
    (mean) (default: mean where it is not trained, with --param-group-preset rnd1 or --lora-rank,
    else keep)."""


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: low-rank adapters that are trained in place of the weights."""

    lora_rank: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Train adapters of this rank on frozen weights instead of the weights themselves; exports,
    evaluations and runs that start from the result get them merged."""
    lora_alpha: Annotated[float | None, ABOVE_ZERO, FIXED] = None
    """An adapter is scaled by this over --lora-rank (default: --lora-rank)."""
    lora_dropout: Annotated[float, BELOW_ONE, FIXED] = 0.0
    """Probability with which an input of an adapter is dropped in training."""
    lora_target_modules: Annotated[tuple[LoRATarget, ...], FIXED] = get_args(LoRATarget)
    """Layers with an adapter, by Megatron's names: attention's fused projection and its output,
    the feed-forward layers (those of every expert too)."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism: how the model and the batch are spread over processes."""

    tensor_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that share every layer (TP)."""
    pipeline_model_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Pipeline stages that share the layers (PP)."""
    context_parallel_size: Annotated[int, AT_LEAST_ONE] = 1
    """Processes that share the tokens of each row of an update and of the teacher (CP), for long
    responses; rollouts and evaluations share texts instead."""
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
    """Gather the weights of an update from the data-parallel processes during the next update's
    forward pass; needs --use-distributed-optimizer and --overlap-grad-reduce."""
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach experts on other processes: alltoall (short rows without gradients, such as
    a step of decoding, are gathered instead), or flex (DeepEP, must be installed)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo), cuda (NCCL), or auto: cuda where there is one."""
    distributed_timeout_minutes: Annotated[int, AT_LEAST_ONE] = 10
    """Minutes that a collective may wait for the other processes, and a process be without progress
    while it trains, before the run is aborted."""
    watch_ranks: bool = True
    """Let processes watch each other over a connection to rank 0: one that dies ends the others in
    seconds, and one that stalls is named."""
    stall_minutes: Annotated[float, ABOVE_ZERO] = 5.0
    """Minutes without progress after which a process is named, with its phase and stack."""


@dataclass(frozen=True)
class DataConfig:
    """Data: prompts, corpora and their order."""

    prompts: str | None = None
    """Prompts for rollouts: JSONL, one object a line with `messages` (chat) or `prompt`; or
    Parquet, Arrow, a pattern, hf://datasets/owner/name, or a mixture of these in a YAML file."""
    train_data: str | None = None
    """Prompts with answers for data-set objectives, from the same kinds of files: `prompt` and
    `response`, or `messages` that end with the assistant's."""
    train_on: Annotated[TrainOn, FIXED] = "last"
    """Turns of the assistant in `messages` that are trained on: the last one of a chat, or all,
    each as a separate example with everything before it as the prompt."""
    data_path: str | None = None
    """Pretraining corpus: prefix of the .bin and .idx file that megatron-dlm preprocess wrote
    (Megatron's indexed dataset)."""
    seq_length: Annotated[int, AT_LEAST_ONE, FIXED] = 2048
    """Tokens of a corpus window, the sample that --global-batch-size counts. Documents are packed
    into windows end to end; those of a window do not see each other."""
    max_prompt_length: Annotated[int, AT_LEAST_ONE] = 1024
    """Longest prompt in tokens, chat template included."""
    long_prompts: Annotated[LongPrompts, FIXED] = "error"
    """How to treat longer prompts: raise an error that names the line (error), leave them out
    (drop), or keep only their last --max-prompt-length tokens (truncate)."""
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
    """Text to append to the last user message (or to `prompt`) of a record, by its domain; JSON as
    a flag. `default` stands for all domains that are not named."""
    max_response_length_by_domain: Annotated[dict[str, int], AT_LEAST_ONE] = field(
        default_factory=dict
    )
    """Longest response in tokens by the domain of a record, where that is below
    --max-response-length; JSON as a flag. `default` stands for all domains that are not named."""
    chat_template_kwargs: Annotated[dict[str, Any], FIXED] = field(default_factory=dict)
    """Variables for the chat template, for example {"enable_thinking": false}; JSON as a flag.
    Those of a record (`chat_template_kwargs`) override them."""


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
    """Sequences a data-parallel process decodes at once (under full attention, the canvases of one
    forward), fewer where --max-total-tokens has no room for them."""
    max_total_tokens: Annotated[int | None, AT_LEAST_ONE] = None
    """Tokens that the KV cache of a data-parallel process has room for, in pages of 32. A prompt
    waits until there are pages for it and its longest response (default: enough for
    --max-running-requests, up to 80 % of the free memory of a GPU)."""
    chunked_prefill_size: Annotated[int, AT_LEAST_ONE] = 8192
    """Most prompt tokens of a forward; longer prompts are prefilled in pieces of this size, while
    other sequences are decoded."""


@dataclass(frozen=True)
class RolloutConfig(DecodingConfig):
    """Rollout: block-diffusion generation by the student."""

    num_rollouts: Annotated[int | None, AT_LEAST_ONE] = None
    """Rollouts to do, all of --rollout-batch-size prompts, whatever epoch they are in; together
    with it they set the number of updates (alternative: --num-epochs)."""
    rollout_batch_size: Annotated[int, AT_LEAST_ONE, FIXED] = 128
    """Prompts per rollout, over all data-parallel processes."""
    shared_rollout_queue: bool = True
    """Let every data-parallel replica take the next prompt when it has room for it, instead of an
    equal share at once. Off, a run repeats itself even where rounding depends on what is decoded
    together (bf16)."""
    partial_rollouts: Annotated[float, AT_LEAST_HALF] = 1.0
    """Share of the responses in decoding that a rollout waits for. The others keep what they have
    by then, and go on in the next rollout with its weights. A rollout still trains on
    --rollout-batch-size responses: more are in decoding. 1 waits for all."""
    max_response_rollouts: Annotated[int, AT_LEAST_TWO] = 4
    """Rollouts that a response may take part in (its staleness is one less); the last one waits for
    its end."""
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
    """How the threshold goes from --dynamic-threshold to --final-dynamic-threshold (cosine: slowly
    at first)."""
    dynamic_threshold_hold_rollouts: Annotated[int, AT_LEAST_ZERO] = 0
    """Rollouts with --dynamic-threshold before it starts to change."""
    dynamic_threshold_rollouts: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Rollouts after those over which it changes; later ones have the final value (default: all
    that are left of the run)."""
    max_tries: Annotated[int, AT_LEAST_ONE] = 8
    """Most responses to a prompt, each with other noise, until --reward rates one right (objectives
    that verify responses)."""
    teacher_response_fraction: Annotated[float, FRACTION] = 0.0
    """Share of a rollout's prompts whose response is taken from the autoregressive teacher instead
    of the student; with a schedule, the share at the first rollout."""
    final_teacher_response_fraction: Annotated[float, FRACTION] = 0.0
    """That share at the end of a linear or cosine schedule."""
    teacher_response_fraction_schedule: Schedule = "constant"
    """How the share goes from --teacher-response-fraction to --final-teacher-response-fraction."""
    teacher_response_fraction_rollouts: Annotated[int | None, AT_LEAST_ONE, FIXED] = None
    """Rollouts over which the share changes; later ones have the final share (default: all of the
    run)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective: what a training row looks like and what is supervised."""

    objective: Annotated[ObjectiveName, FIXED] = "opdlm"
    """opdlm: on-policy distillation of a block-diffusion student from an autoregressive teacher;
    opdlm_off: the same at random states of its rollouts; off_policy: distillation at random states
    of the teacher's own responses; sft: block-diffusion cross entropy on --train-data, or on the
    teacher's responses to --prompts; scp: continual pretraining on the corpus --data-path under
    full attention with shifted predictions (RND1); next_token: autoregressive training on
    --train-data or --data-path; d_opsd: on-policy self-distillation of a diffusion model, whose
    teacher sees later tokens of the response."""
    state_selection: StateSelection | None = None
    """Denoising states that are trained on. opdlm: one step of each block (per_block, its default),
    one of the whole trajectory (global), or every step (all); d_opsd: every step of every block but
    the last (all); the other block-diffusion objectives mask at random (random)."""
    empty_mask: EmptyMask = "redraw"
    """How to treat a block of a random state in which no supervised token was masked: draw it again
    with another t (redraw), or mask one of its tokens (mask_one; with tokens weighted by 1/t the
    loss would have no mean)."""
    attention_pattern: Annotated[Literal["full", "causal"] | None, FIXED] = None
    """What a token sees under scp: all of its document (full), or only earlier tokens (causal: the
    diffusion model that RND1's grafting trains first, for a second run with --finetune under full
    attention) (default: full)."""
    attention_annealing_iters: Annotated[int, AT_LEAST_ZERO, FIXED] = 0
    """Optimizer steps over which scp goes from causal to full attention: a later token is visible
    with a probability that rises from 0 to 1, drawn for each pair of tokens (DiffuLLaMA's
    attention-mask annealing). 0: full from the first step."""
    loss_weighting: Literal["inverse_t", "none"] = "inverse_t"
    """Weight of a token under sft and scp: 1/t, where its block (scp: its document) was masked with
    probability t (inverse_t), or 1 (none). Distillation always weighs 1."""
    supervise_eos: bool = True
    """Supervise the end-of-sequence token of a response as well."""
    loss_normalization: Literal["token", "row_mean"] = "token"
    """Divide by the supervised tokens of the global batch (token; scp: by all that could have been
    masked; d_opsd: by its states), or average over the rows of each row's mean (row_mean; d_opsd:
    over those with states)."""
    reward: str = "exact_match"
    """How a response is rated by fields of its prompt's record (docs/evaluation.md), by objectives
    that verify responses and on --eval-prompts:
    exact_match, math_verify, choice, instructions, code_tests, countdown, sudoku, or
    package.module:function of your own."""
    unsafe_code_execution: bool = False
    """Let the reward code_tests run code without isolation where the machine allows none: the code
    can then do what you can."""


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation: the teacher and the divergence from it."""

    teacher_load: str | None = None
    """Frozen teacher, a Hugging Face folder or Megatron checkpoint: an autoregressive one (default:
    --load, the weights that the student starts from); for d_opsd a copy of the diffusion model that
    the student starts as (default: the student without its adapters)."""
    teacher_responses: str | None = None
    """Folder with the teacher's responses to --prompts, if an objective or
    --teacher-response-fraction needs them; missing responses to the run's prompts are
    generated before training, with the rollout's temperature, top-k, top-p and
    --max-response-length (default: teacher_responses in the run folder)."""
    cache_teacher_targets: bool = False
    """Compute the teacher's --divergence-top-k most likely tokens at every token of its stored
    responses once, keep them beside these, and train without the teacher in memory."""
    offload_teacher: bool = False
    """Keep the teacher's weights in host memory while they are not used: during rollouts and, all
    but its output layer, during updates."""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, or a weighted sum such as forward_kl:0.5,reverse_kl:0.5."""
    jsd_beta: Annotated[float, BETWEEN_ZERO_AND_ONE] = DivergenceSpec.jsd_beta
    """Weight of the teacher in the mixture of jsd."""
    divergence_top_k: Annotated[int, AT_LEAST_ZERO] = 0
    """Compare only the teacher's k most likely tokens; 0 compares the full vocabulary."""
    divergence_tail: Literal["bucket", "ignore"] = "bucket"
    """With --divergence-top-k, how to treat the remaining probability: as one more class (bucket),
    or leave it out (ignore; the result can then be negative)."""
    divergence_chunk_size: Annotated[int | None, AT_LEAST_ONE] = None
    """Supervised tokens whose logits are in memory at a time; limits memory, not the result
    (default: as many as less than 1 GiB holds, on CUDA a quarter of what is free)."""


@dataclass(frozen=True)
class SelfDistillationConfig:
    """Self-distillation (d_opsd): what the teacher sees, and where the student is supervised."""

    reveal_fraction: Annotated[float, FRACTION] = 0.25
    """Share of the positions in later blocks at which the teacher sees the student's final
    tokens."""
    positions_per_state: Annotated[int, AT_LEAST_ONE] = 2
    """Masked positions of the current block that are supervised: where the teacher is most
    certain."""
    position_ranking: Literal["probability", "logit"] = "probability"
    """Measure of the teacher's certainty at a position: the probability of its most likely token,
    or the logit before the softmax (logit, as in the published code)."""
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
    """Keep the optimizer's state and main weights in host memory, and free gradients, during
    rollouts and the teacher's forwards (without rollouts, those of every update)."""
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
    """Parameter groups with their own settings, a list of {pattern, lr, min_lr, weight_decay};
    JSON on the command line. Patterns: attention, mlp, experts, router, embedding, norm, output,
    default (what is in no other group), or a regular expression."""
    param_group_preset: ParamGroupPreset | None = None
    """Published parameter groups instead of --param-groups. rnd1: attention at a peak rate of 3e-4,
    everything else at 1e-8, weight decay 0.1 (meant for --lr-decay-style constant)."""


@dataclass(frozen=True)
class TrainingConfig:
    """Training: batch sizes and length of the run."""

    micro_batch_size: Annotated[int, AT_LEAST_ONE] = 1
    """Trajectories (or corpus windows) packed into one row, the unit of a forward pass."""
    max_tokens_per_micro_batch: Annotated[int | None, AT_LEAST_ONE] = None
    """Pack the trajectories of an update into rows of at most this many tokens, as few rows as
    possible, instead of --micro-batch-size; the teacher's rows too. Only what is longer by itself
    gets a longer row. Data-parallel processes share the update by cost."""
    global_batch_size: Annotated[int, AT_LEAST_ONE, FIXED] = 8
    """Trajectories (or corpus windows) per optimizer update, over all data-parallel processes."""
    train_iters: Annotated[int | None, AT_LEAST_ONE] = None
    """Optimizer steps of objectives without rollouts; the others derive it from --num-rollouts."""
    num_epochs: Annotated[int | None, AT_LEAST_ONE] = None
    """Passes over the data, instead of --num-rollouts or --train-iters; the last rollout or update
    takes the remaining samples (61,816 prompts at 128 a rollout: 483 rollouts, the last of 120)."""
    epochs_per_rollout: Annotated[int, AT_LEAST_ONE, FIXED] = 1
    """Passes over the trajectories of a rollout before the next one."""
    exit_duration_in_mins: Annotated[float | None, ABOVE_ZERO] = None
    """Minutes from its start after which a run saves and ends as if it was sent SIGTERM: with
    status 75, to be started again."""
    on_divergence: str = "stop"
    """What becomes of a run whose loss or gradient is no finite number. stop: it ends with status
    3. skip:N: the update is left out, up to N times in a row."""


@dataclass(frozen=True)
class LoggingConfig:
    """Logging and checkpoints."""

    save: str | None = None
    """Run folder: checkpoints, metrics.jsonl, resolved configuration, TensorBoard."""
    save_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between checkpoints, rounded up to the end of the rollout; 0 leaves it to
    --save-interval-minutes."""
    save_interval_minutes: Annotated[float, AT_LEAST_ZERO] = 30.0
    """Minutes after the last checkpoint from which on the next one is written, after an update or a
    rollout; 0 leaves it to --save-interval. The end of the run is always saved."""
    keep_checkpoints: Annotated[int, AT_LEAST_ZERO] = 0
    """Latest checkpoints to keep; 0 keeps all."""
    keep_checkpoint_every: Annotated[int, AT_LEAST_ZERO] = 0
    """Keep those whose iteration is a multiple of this too, with --keep-checkpoints; 0 keeps no
    others."""
    keep_best_checkpoint: bool = False
    """Keep the best checkpoint by held-out data too, with --keep-checkpoints: by the accuracy on
    --eval-prompts under the first decoding, of which each new best is saved at once, else by the
    validation loss, which is then measured for every checkpoint."""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy in the host's memory; off, training waits
    and there is no copy."""
    measure_machine: bool = True
    """Measure the rate of matrix products and the memory bandwidth of a device when a run starts (a
    fraction of a second): what `mfu` and `rollout_floor_share` are shares of."""
    log_interval: Annotated[int, AT_LEAST_ONE] = 1
    """Optimizer steps between two lines of progress; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well (wandb must be installed)."""
