"""What a checkpoint's generation_config.json asks for: honoured, set aside with a warning, or refused while loading."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import mostly_slow
from scripted_model import EOS, byte_tokenizer, write_scripted

RUN = ("run", "the cat", "-n", "3", "--device", "cpu", "--temperature", "0")
SAMPLES = {"do_sample": True}

# Several at once, of which none may change anything.
SILENT = [
    {"bad_words_ids": [], "sequence_bias": [], "suppress_tokens": [], "begin_suppress_tokens": [], "stop_strings": []},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
    {"use_cache": False, "cache_implementation": "hybrid"},
    {"penalty_alpha": 0.0, "guidance_scale": 1.0, "token_healing": False, "num_beam_groups": 1}
    | {"cache_implementation": "dynamic"},
]
SET_ASIDE = [
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "quantized"},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded_static"},
    {"cache_implementation": "paged"},
    {"prompt_lookup_num_tokens": 4},
    {"assistant_early_exit": 1},
    {"prefill_chunk_size": 2},
    {"is_assistant": True},
    SAMPLES | {"num_return_sequences": 2},
]
REFUSED = [
    {"token_healing": True},
    {"dola_layers": "low"},
    {"force_words_ids": [[5]]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 1.0},
    {"guidance_scale": 1.5},
    {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.0}},
    {"stop_strings": [""]},
    {"stop_strings": [5]},
    {"bad_words_ids": [[-1]]},
    {"bad_words_ids": "a"},
    {"bad_words_ids": [[10**6]]},
    {"sequence_bias": [[[10**6], 1.0]]},
    {"exponential_decay_length_penalty": 3},
    {"cache_implementation": "shared"},
]


def _id(settings: dict[str, object]) -> str:
    return "-".join(f"{name}={value}" for name, value in settings.items())


@pytest.fixture(scope="module")
def answers() -> dict[Path, str]:
    return {}


@pytest.fixture
def expected(cli, llama: Path, answers: dict[Path, str]) -> str:
    """What `run` answers with no settings of the model's; asked once."""
    if llama not in answers:
        answers[llama] = cli(*RUN, "-q", "-m", llama).out
    return answers[llama]


@pytest.mark.parametrize("settings", mostly_slow(SILENT, 3), ids=_id)
def test_settings_that_change_nothing(cli, copy: Path, edit, expected: str, settings: dict[str, object]):
    edit(copy / "generation_config.json", **settings)
    outcome = cli(*RUN, "-q", "-m", copy)
    assert (outcome.code, outcome.out, outcome.err) == (0, expected, "")
    assert cli("chat", "-q", "-m", copy, *RUN[2:], stdin="the cat\n").out == expected


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("settings", mostly_slow(SET_ASIDE, 4), ids=_id)
def test_settings_that_are_set_aside(cli, copy: Path, edit, expected: str, settings: dict[str, object]):
    edit(copy / "generation_config.json", **settings)
    outcome = cli(*RUN, "-q", "-m", copy)
    assert (outcome.code, outcome.out) == (0, expected)
    assert outcome.err.startswith(f"griffin-offload: warning: {list(settings)[-1]} of copy")
    assert outcome.err.count("\n") == 1
    if settings in SET_ASIDE[::3]:
        assert cli("chat", "-q", "-m", copy, *RUN[2:], stdin="the cat\n").out == expected


@pytest.mark.parametrize("settings", REFUSED, ids=_id)
def test_settings_that_are_refused(cli, copy: Path, edit: Callable[..., None], settings: dict[str, object]):
    edit(copy / "generation_config.json", **settings)
    cli.refuses(4, f"{next(iter(settings))}|generation_config.json", *RUN, "-q", "-m", copy)


@pytest.mark.parametrize(
    ("place", "flags"), [("config.json", ()), ("generation_config.json", ("--exact",))], ids=["pruned", "exact"]
)
def test_a_cache_that_training_has_switched_off(cli, copy: Path, edit: Callable[..., None], place: str, flags):
    """Decoding is never without one, and the text is the same: transformers' is only slower."""
    run = (*RUN, "-q", "-m", copy, *flags)
    expected = cli(*run).out
    if place == "config.json":
        (copy / "generation_config.json").unlink()
    edit(copy / place, use_cache=False)
    assert cli(*run).out == expected


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes " one.TWO<|im_end|>xyz" behind a "b"."""
    tokenizer = byte_tokenizer(["<|im_end|>"])
    ids = tokenizer("b one.TWO<|im_end|>xyz")["input_ids"]
    return write_scripted(tmp_path_factory.mktemp("speaker"), tokenizer, [*ids, EOS])


@pytest.fixture
def spoken(cli, speaker: Path) -> Callable[..., str]:
    """What is said with the settings given, by `run` and `chat`."""

    def say(*flags: str, template: str | None = None, ends: str = "</s>", **settings: object) -> tuple[str, str]:
        config = json.loads((speaker / "tokenizer_config.json").read_text()) | {"eos_token": ends}
        (speaker / "tokenizer_config.json").write_text(json.dumps(config))
        (speaker / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, **settings}))
        (speaker / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (speaker / "chat_template.jinja").write_text(template)
        more = ("-m", speaker, "-n", "30", "--temperature", "0", "-q", *flags)
        return cli("run", "b", *more).out, cli("chat", *more, stdin="b\n").out

    return say


@pytest.mark.parametrize(
    ("strings", "flags"), [("TWO", ("--exact",)), (["never", "TW"], ())], ids=["one-exact", "several-pruned"]
)
def test_stop_strings_end_an_answer(spoken, strings: object, flags: tuple[str, ...]):
    """As in transformers they stay at its end."""
    assert spoken(*flags, stop_strings=strings) == (" one.TWO\n" if strings == "TWO" else " one.TW\n",) * 2


def test_a_stop_string_that_is_a_special_token(spoken):
    assert spoken(stop_strings=["<|im_end|>"]) == (" one.TWO\n",) * 2


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] != 'user' %}END{% endif %}{% endfor %}"


def test_the_end_that_the_tokenizer_knows(spoken):
    assert spoken() == (" one.TWOxyz\n",) * 2
    assert spoken(ends="<|im_end|>") == (" one.TWO\n",) * 2
    assert spoken(ends="<|im_end|>", eos_token_id=None) == (" one.TWO\n",) * 2


@pytest.mark.parametrize("behind", ["<|im_end|>", "\n<|im_end|>\n", "<|im_end|></s>"])
def test_the_end_that_the_template_writes(spoken, behind: str):
    template = TEMPLATE.replace("END", behind)
    assert spoken(template=template) == (" one.TWO\n",) * 2
    assert spoken("--raw", template=template) == (" one.TWOxyz\n",) * 2


@pytest.mark.parametrize("behind", ["", " x ", "{{ raise_exception('no answers') }}"])
def test_templates_that_say_nothing_of_an_end(spoken, behind: str):
    assert spoken(template=TEMPLATE.replace("END", behind)) == (" one.TWOxyz\n",) * 2
