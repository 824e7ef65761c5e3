"""Arguments of transformers' callers to exported models, and the results."""

import logging
import math
import re

import pytest
import torch
from tokenizers.decoders import Fuse
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from tests.unit_tests.conversion.diffusion_models import (
    EOS,
    MASK,
    MODELS,
    PAD,
    SIZES,
    VOCAB_SIZE,
    padded,
    random_diffusion_model,
    random_prompt,
)
from tests.unit_tests.conversion.tokenizers import save_tokenizer

PROMPT = random_prompt(6)[None]


@pytest.fixture(scope="module")
def model():
    return random_diffusion_model("sdar")


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    return random_diffusion_model(request.param)


@pytest.fixture
def generation_config(model):
    """The model's generation config, restored after a test that changes it."""
    before, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=EOS)
    yield model.generation_config
    model.generation_config = before


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(
        save_tokenizer(tmp_path_factory.mktemp("tokenizer"), first_free_id=MASK)
    )
    tokenizer.backend_tokenizer.decoder = Fuse()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


def test_lengths_are_those_of_transformers(model, generation_config):
    assert model.generate(PROMPT, max_new_tokens=5, eos_token_id=None).shape == (1, 11)
    limited = model.generate(PROMPT, max_length=9, eos_token_id=[])
    assert torch.equal(limited, model.generate(PROMPT, max_new_tokens=3, eos_token_id=[]))
    with pytest.raises(ValueError, match="Input length of input_ids is 6, but `max_length`"):
        model.generate(PROMPT, max_length=6)
    # The prompt counts with its padding, as it does there.
    rows, mask = padded([PROMPT[0], random_prompt(9)])
    output = model.generate(rows, attention_mask=mask, max_length=14, eos_token_id=[])
    assert output.shape == (2, 14)
    assert model.generate(PROMPT, eos_token_id=[]).shape == (1, 6 + 256)
    held_back = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=5, eos_token_id=range(58))
    assert held_back.shape == (1, 6 + 6)
    assert set(held_back[0, 6:-1].tolist()) == {58}


def test_sampling_is_asked_for_by_do_sample(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    greedy = model.generate(PROMPT, max_new_tokens=20)
    for ignored in ({"temperature": 9.0}, {"do_sample": False, "temperature": 9.0, "top_p": 0.5}):
        caplog.clear()
        assert torch.equal(model.generate(PROMPT, max_new_tokens=20, **ignored), greedy)
        assert "temperature" in caplog.text
    sampled = [
        model.generate(PROMPT, max_new_tokens=20, do_sample=True, temperature=9.0) for _ in range(2)
    ]
    assert not torch.equal(*(output[0, :20] for output in sampled))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, do_sample=True, top_k=1), greedy)
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(PROMPT, num_return_sequences=2)
    three = model.generate(PROMPT, max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert len(three) == 3


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", 0.0, "is outside (0, 100]; choose a number in (0, 100]"),
        ("temperature", -1.0, "is outside (0, 100]"),
        ("temperature", 101.0, "is outside (0, 100]"),
        ("temperature", math.inf, "is outside (0, 100]"),
        ("temperature", math.nan, "is not a number"),
        ("temperature", "warm", "is not a number"),
        ("top_k", -1, "is negative; 0 is off"),
        ("top_k", 2.5, "is not a whole number; 0 is off"),
        ("top_p", 1.5, "is outside (0, 1]; 1 is off"),
        ("top_p", math.nan, "is not a number; 1 is off"),
        ("block_size", 2.5, "is not a whole number"),
        ("block_size", "four", "is not a whole number"),
        ("mask_token_id", 10**6, "is outside [0, "),
        ("max_new_tokens", 2.5, "is not a whole number"),
        ("min_new_tokens", 0.5, "is not a whole number"),
        ("dynamic_threshold", math.nan, "is not a number"),
        ("dynamic_threshold", "high", "is not a number"),
    ],
)
def test_numbers_that_cannot_work_are_named(model, name, value, problem):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` (={value!r}) {problem}")):
        model.generate(PROMPT, **{"do_sample": True, "max_new_tokens": 4, name: value})


def test_the_call_wins_over_its_config_and_this_over_the_folders(model, generation_config):
    def like(**arguments):
        return model.generate(PROMPT, eos_token_id=[], **arguments)

    static = {"remasking_strategy": "low_confidence_static", "block_size": 8, "denoising_steps": 2}
    expected = like(max_new_tokens=9, **static)
    assert not torch.equal(like(max_new_tokens=9, **static | {"denoising_steps": 8}), expected)
    for name, value in static.items():
        setattr(generation_config, name, value)
    generation_config.max_new_tokens = 4
    assert like().shape[1] == 6 + 4
    own = GenerationConfig(max_new_tokens=9, eos_token_id=[])
    assert torch.equal(model.generate(PROMPT, own), expected)
    own.denoising_steps = 8
    assert not torch.equal(model.generate(PROMPT, own), expected)
    assert torch.equal(model.generate(PROMPT, own, denoising_steps=2), expected)


def test_any_listed_eos_ends_a_response(model, generation_config):
    response = model.generate(PROMPT, max_new_tokens=20, eos_token_id=[])[0, 6:].tolist()
    different = list(dict.fromkeys(response))
    ends = [VOCAB_SIZE + 5, different[2], different[1]]
    expected = response[: response.index(different[1]) + 1]
    settings = {"max_new_tokens": 20}
    for given in (ends, torch.tensor(ends)):
        assert model.generate(PROMPT, eos_token_id=given, **settings)[0, 6:].tolist() == expected
    one = model.generate(PROMPT, eos_token_id=different[1], **settings)
    assert one[0, 6:].tolist() == expected
    generation_config.eos_token_id = ends
    assert model.generate(PROMPT, **settings)[0, 6:].tolist() == expected


def test_padding_is_found_as_transformers_finds_it(model):
    prompts = [random_prompt(3), random_prompt(9)]
    rows, mask = padded(prompts)
    masked = model.generate(rows, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(model.generate(rows, max_new_tokens=8), masked)
    assert torch.equal(model.generate(input_ids=rows, max_new_tokens=8), masked)
    # Where padding is an EOS, only a mask can tell.
    settings = {"max_new_tokens": 8, "eos_token_id": PAD}
    seen = model.generate(rows, **settings)
    assert not torch.equal(seen, model.generate(rows, attention_mask=mask, **settings))
    settings["pad_token_id"] = 1
    alone = model.generate(prompts[0][None], **settings)[0, 3:]
    batched = model.generate(rows, attention_mask=mask, **settings)[0, 9:]
    assert torch.equal(batched[: len(alone)], alone)
    assert set(batched[len(alone) :].tolist()) <= {1}
    with pytest.raises(ValueError, match="must be 2D"):
        model.generate(rows, attention_mask=mask[:, None])


class Recorder:
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        assert not self.has_ended
        self.values.append(value)

    def end(self):
        self.has_ended = True


def test_streamers_are_given_the_prompt_and_then_tokens_in_order(any_model, tokenizer):
    settings = {"max_new_tokens": 12, "eos_token_id": [], "denoising_steps": 4}
    recorder = Recorder()
    output = any_model.generate(PROMPT, streamer=recorder, **settings)
    assert recorder.has_ended
    assert torch.equal(recorder.values[0], PROMPT)
    assert torch.equal(torch.cat(recorder.values[1:]), output[0, 6:])
    # Rows of a batch are streamed column by column; after the end of one there is padding.
    rows, mask = padded([random_prompt(3), random_prompt(9)])
    recorder = Recorder()
    settings |= {"eos_token_id": [*output[0, 8:9].tolist(), 12, 17, 33, 41]}
    output = any_model.generate(rows, attention_mask=mask, streamer=recorder, **settings)
    assert torch.equal(torch.stack(recorder.values[1:], dim=1), output[:, 9:])

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = any_model.generate(PROMPT, streamer=streamer, max_new_tokens=12)
    assert "".join(streamer) == tokenizer.decode(output[0, 6:])


def test_stop_strings_end_a_response_behind_them(model, tokenizer):
    response = model.generate(PROMPT, max_new_tokens=20, eos_token_id=[])[0, 6:]
    texts = [tokenizer.decode(token) for token in response]
    stop = "".join(texts[3:6])
    length = next(n for n in range(21) if stop in "".join(texts[:n]))
    settings = {"max_new_tokens": 20, "eos_token_id": [], "stop_strings": [stop]}
    output = model.generate(PROMPT, tokenizer=tokenizer, **settings)
    assert torch.equal(output[0, 6:], response[:length])
    rows, mask = padded([random_prompt(9), PROMPT[0]])
    output = model.generate(rows, attention_mask=mask, tokenizer=tokenizer, **settings)
    assert torch.equal(output[1, 9 : 9 + length], response[:length])
    assert set(output[1, 9 + length :].tolist()) <= {PAD}
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(PROMPT, **settings)


class HasSeen(StoppingCriteria):
    """Ends the batch once every row has shown a token; looks at the last token only."""

    def __init__(self, token, rows):
        self.token, self.seen = token, [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.seen)
        self.seen = [
            seen or row[-1] == self.token for seen, row in zip(self.seen, input_ids, strict=True)
        ]
        return all(self.seen)


def test_stopping_criteria_are_asked_behind_every_token(model):
    free = model.generate(PROMPT, max_new_tokens=30, eos_token_id=[])[0, 6:].tolist()
    token = free[7]
    output = model.generate(
        PROMPT,
        max_new_tokens=30,
        eos_token_id=[],
        stopping_criteria=StoppingCriteriaList([HasSeen(token, 1)]),
    )
    assert output[0, 6:].tolist() == free[: free.index(token) + 1]


def test_ids_of_32_bits_are_ids(model):
    expected = model.generate(PROMPT, max_new_tokens=3)
    assert torch.equal(model.generate(PROMPT.int(), max_new_tokens=3), expected)


def test_what_is_returned_on_request(model):
    sequences = model.generate(PROMPT, max_new_tokens=5)
    output = model.generate(PROMPT, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(output.sequences, sequences)
    assert torch.equal(model.generate(bos_token_id=9, max_new_tokens=5)[:, :1], torch.tensor([[9]]))
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined"):
        model.generate(max_new_tokens=5)


def test_unknown_arguments_are_refused_as_transformers_refuses_them(model):
    theirs = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in SIZES.items() if "mask" not in k}))
    for unknown in ({"max_tokens": 3}, {"temprature": 0.5, "foo": False}):
        with pytest.raises(ValueError, match="not used by the model") as expected:
            theirs.generate(PROMPT, **unknown)
        with pytest.raises(ValueError, match="not used by the model") as found:
            model.generate(PROMPT, **unknown)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.1},
        {"output_scores": True},
        {"do_sample": True, "min_p": 0.1},
        {"logits_processor": [lambda input_ids, scores: scores]},
    ],
    ids=lambda option: list(option)[-1],
)
def test_what_diffusion_cannot_do_is_refused_and_never_ignored(model, option):
    with pytest.raises(ValueError, match=f"`{list(option)[-1]}`.* is not supported"):
        model.generate(PROMPT, max_new_tokens=4, **option)


def test_pipeline_answers_texts_and_chats_one_by_one_and_in_batches(any_model, tokenizer):
    generate = pipeline("text-generation", model=any_model, tokenizer=tokenizer)
    texts, settings = ["abcdef", "gh", "ijklm"], {"max_new_tokens": 9, "do_sample": False}
    found = generate(texts, batch_size=3, return_full_text=False, **settings)
    expected = []
    for text in texts:
        token_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        response = any_model.generate(token_ids, **settings)[0, token_ids.shape[1] :]
        expected.append(tokenizer.decode(response, skip_special_tokens=True))
    assert [answer["generated_text"] for (answer,) in found] == expected
    (answer,) = generate([{"role": "user", "content": texts[0]}], **settings)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": expected[0]}
    torch.manual_seed(0)
    assert len(generate(texts[0], num_return_sequences=2, max_new_tokens=3)) == 2


@torch.no_grad()
def test_a_likelihood_is_refused_with_the_remedy(any_model):
    clean, noisy = PROMPT, torch.cat((PROMPT, torch.tensor([[MASK]])), dim=1)
    refused = [
        lambda: any_model(clean),  # lm-evaluation-harness, loglikelihood
        lambda: any_model(input_ids=clean, attention_mask=torch.ones_like(clean)),
        lambda: any_model(clean, labels=clean),  # Trainer
        lambda: any_model(noisy, labels=noisy),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"means nothing.*generate_until.*attention_pattern="):
            call()
    pattern = any_model.config.attention_pattern
    assert any_model(noisy).logits.shape == (1, 7, VOCAB_SIZE)
    assert any_model(clean, attention_pattern=pattern).logits.shape == (1, 6, VOCAB_SIZE)


@pytest.mark.parametrize("kind", ["float", "additive", "bool"])
@torch.no_grad()
def test_samplers_with_masks_and_a_cache_of_their_own_work(model, kind):
    """As the published sampler of SDAR calls: prefill, denoise without storing, commit."""
    tokens = torch.cat((random_prompt(8), torch.tensor([MASK] * 4), random_prompt(4)))[None]
    block = torch.arange(16) // 4
    visible = (block[:, None] >= block)[None]
    if kind == "float":
        visible = visible.float()
    elif kind == "additive":
        visible = torch.zeros(1, 1, 16, 16).masked_fill(~visible[:, None], -torch.inf)
    positions = torch.arange(16)[None]
    expected = model(tokens, block_size=4).logits
    cache, parts = DynamicCache(), []
    for start, stop, stored in ((0, 8, True), (8, 12, False), (8, 12, True), (12, 16, True)):
        output = model(
            tokens[:, start:stop],
            attention_mask=visible[..., start:stop, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            store_kv=stored,
        )
        assert cache.get_seq_length() == (stop if stored else start)
        assert (output.logits - expected[:, start:stop]).abs().max() < 1e-5
        parts.append(output.logits)
    assert torch.equal(parts[1], parts[2])
