"""`generate` of a diffusion model, for plain transformers.

B: sequences; P: tokens of a prompt, padding included.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, MaxTimeCriteria, StopStringCriteria

from megatron_dlm.rollout.strategies import STRATEGIES

from .denoising import Denoising
from .generation_arguments import (
    DIFFUSION_OPTIONS,
    DecodingSettings,
    check_support,
    checked_attention_mask,
    decoding_settings,
    new_tokens_allowed,
)
from .response_columns import ResponseColumns
from .row_cache import RowCache
from .speculation import Speculation


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a model `generate`: block by block or, under full attention, also as a whole."""

    config: Any
    generation_config: Any
    model: Any
    lm_head: Any
    device: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Denoise the responses to a batch of prompts.

        Arguments are those of transformers' `generate`. A value is taken from the call, else from
        `generation_config`, else from the folder's generation_config.json, else from config.json.
        A row's response depends neither on other rows nor on padding (on either side): positions
        and blocks count from the first token that is not padding.

        Args:
            inputs: [B, P], prompts; or `input_ids`. None: one prompt that consists of BOS.
            generation_config: Values for arguments that the call leaves out.
            logits_processor: Must be empty.
            stopping_criteria: Called after every token of the response, in order.
            streamer: Receives the prompts and then tokens in order, as soon as no token before them
                is MASK.
            generator: Gives the seed of the draws; default: torch's, which `torch.manual_seed`
                and transformers' `set_seed` seed. Rows with equal prompts draw differently;
                all others as they would alone.
            **kwargs: Fields of transformers' GenerationConfig: `max_new_tokens` (default 256) or
                `max_length`, `min_new_tokens`, `do_sample` (default: the most likely tokens),
                `temperature`, `top_k`, `top_p`, `num_return_sequences`, `eos_token_id` (each of a
                list ends a response), `pad_token_id` (after shorter responses), `use_cache`,
                `stop_strings` (with `tokenizer`), `max_time`, `return_dict_in_generate`; and

                - `attention_mask`: [B, P], zero for padding, on either side;
                - `block_size`: default: the config's. Under full attention None denoises the
                  response as a whole;
                - `remasking_strategy`: one of `STRATEGIES`. Default:
                  `low_confidence_dynamic`, and `entropy` under full attention;
                - the option of that strategy: `dynamic_threshold`, `entropy_bound`, `draft_steps`,
                  or `denoising_steps` (default: `num_diffusion_steps` of the config, else one for
                  each token of a block);
                - `mask_token_id`: default: the config's.

        Returns:
            [B, P + longest response], prompts as given and responses up to and including
            their EOS; with `return_dict_in_generate` an object whose `sequences` these are.

        Raises:
            ValueError: An argument that is unknown, cannot work or has no counterpart here.
        """
        options = {name: kwargs.pop(name, None) for name in DIFFUSION_OPTIONS}
        tokenizer = kwargs.pop("tokenizer", None)
        attention_mask = kwargs.pop("attention_mask", None)
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("`inputs` and `input_ids` were both passed; pass one of them")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        has_default_max_length = kwargs.get("max_length") is None and all(
            config is None or config.max_length == GenerationConfig().max_length
            for config in (generation_config, self.generation_config)
        )
        config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        unknown = [name for name, value in unknown.items() if value is not None]
        if unknown:
            raise ValueError(
                f"The following `model_kwargs` are not used by the model: {unknown} (note: typos "
                "in the generate arguments will also show up in this list)"
            )
        check_support(config, logits_processor)

        input_ids = self._prompt_ids(inputs, config)
        max_new_tokens = new_tokens_allowed(config, input_ids.shape[1], has_default_max_length)
        settings = decoding_settings(
            config, self.config, options, max_new_tokens, input_ids.shape[1]
        )
        pad = self.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
        is_token = checked_attention_mask(input_ids, attention_mask, pad, settings.eos_token_ids)
        copies = config.num_return_sequences or 1
        if copies > 1 and not config.do_sample:
            raise ValueError(
                f"Greedy methods do not support `num_return_sequences` (={copies}) other than 1"
            )
        input_ids = input_ids.repeat_interleave(copies, dim=0)
        is_token = is_token.repeat_interleave(copies, dim=0)
        prompts = [row[mask] for row, mask in zip(input_ids, is_token, strict=True)]
        needs_token = settings.is_shifted or STRATEGIES[settings.remasking_strategy].verifies
        if needs_token and not all(map(len, prompts)):
            raise ValueError("a prompt needs a token to predict the first one from")

        fill = pad if pad is not None else (settings.eos_token_ids or [0])[0]
        criteria = self._criteria(config, stopping_criteria, tokenizer)
        columns = None
        if criteria or streamer is not None:
            columns = ResponseColumns(input_ids, max_new_tokens, fill, criteria, streamer)
        responses = self._denoised_responses(prompts, settings, columns, generator, fill)
        sequences = torch.cat((input_ids, responses), dim=1)
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _prompt_ids(self, inputs: Tensor | None, config: GenerationConfig) -> Tensor:
        if inputs is None:
            if config.bos_token_id is None:
                raise ValueError(
                    "`bos_token_id` has to be defined when no `input_ids` are provided."
                )
            inputs = torch.tensor([[config.bos_token_id]], device=self.device)
        if inputs.ndim != 2 or not len(inputs):
            raise ValueError(
                f"`input_ids` must have the shape [sequences, tokens], but it is "
                f"{tuple(inputs.shape)}"
            )
        return inputs.long()  # ids of 32 bits are valid too

    def _criteria(
        self, config: GenerationConfig, criteria: Any, tokenizer: Any
    ) -> StoppingCriteriaList:
        criteria = StoppingCriteriaList(criteria or [])
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError(
                    "There are stop strings, in the arguments to `generate` or in the model's "
                    "generation config, but no tokenizer: pass it as `tokenizer`."
                )
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        if config.max_time is not None:
            criteria.append(MaxTimeCriteria(config.max_time))
        return criteria

    def _denoised_responses(
        self,
        prompts: list[Tensor],
        settings: DecodingSettings,
        columns: ResponseColumns | None,
        generator: torch.Generator | None,
        fill: int,
    ) -> Tensor:
        """Responses, padded to the longest, [B, longest response]."""
        seed = 0
        if settings.temperature > 0:
            device = "cpu" if generator is None else generator.device
            seed = int(torch.randint(1 << 62, (), generator=generator, device=device))

        def network(
            token_ids: Tensor, mask: Tensor, positions: Tensor, cache: RowCache | None
        ) -> Tensor:
            outputs = self.model(
                token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            return outputs.last_hidden_state

        verifies = STRATEGIES[settings.remasking_strategy].verifies
        decoding = Speculation if verifies else Denoising
        denoising = decoding(prompts, settings, seed, network, self.lm_head)
        lengths = denoising.run(columns)
        if columns is not None:
            columns.finish()
        responses = denoising.responses()[:, : int(lengths.max())]
        is_behind = torch.arange(responses.shape[1], device=lengths.device) >= lengths[:, None]
        return responses.masked_fill(is_behind, fill)
