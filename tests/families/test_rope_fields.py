"""What config.json may say about rotary positions: one line that names the field, in both forms and every family."""

from typing import Any

import pytest

from tests.support.grouped import LLAMA3
from tests.support.models import SHAPE, YARN
from tokensieve.config import UserError
from tokensieve.families import FAMILIES, model_config

SCALED = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
REFUSED: list[tuple[Any, str]] = [
    ({"type": "yarn", "original_max_position_embeddings": 64}, "of type 'yarn' lacks factor; copy it"),
    *(({"type": kind}, f"rope type '{kind}' is not supported, since its freq") for kind in ("longrope", "dynamic")),
    ({"type": "mrope", "mrope_section": [1]}, "rope type 'mrope' is not supported, since it is for models that see"),
    ({"type": "su"}, "rope type 'su' is not supported; tokensieve implements default, linear, llama3, yarn"),
    ({"type": ["yarn"]}, r"rope type \['yarn'\] is not supported; tokensieve"),
    ({"type": "linear"}, "of type 'linear' lacks factor; copy it"),
    ({"type": "linear", "factor": None}, r"\.factor is None; it must be a number of at least 1"),
    ({"type": "linear", "factor": 0.5}, r"\.factor is 0.5; it must be a number of at least 1"),
    ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "of type 'llama3' lacks low_freq_factor; copy it"),
    (LLAMA3 | {"high_freq_factor": 0}, r"\.high_freq_factor is 0; it must be a number above 0"),
    (LLAMA3 | {"low_freq_factor": 4.0}, r"\.high_freq_factor is 4.0; it must be above low_freq_factor 4.0"),
    (LLAMA3 | {"original_max_position_embeddings": None}, r"\.original_max_position_embeddings is None"),
    (SCALED | {"factor": "4"}, r"\.factor is '4'; it must be a number of at least 1"),
    (SCALED | {"factor": float("nan")}, r"\.factor is nan"),
    (SCALED | {"original_max_position_embeddings": 0}, r"\.original_max_position_embeddings is 0"),
    (SCALED | {"beta_fast": "32"}, r"\.beta_fast is '32'; it must be a number above 0"),
    (SCALED | {"mscale": True}, r"\.mscale is True; it must be a number that is not negative"),
    ({"rope_theta": 0}, r"\.rope_theta is 0"),
    ({"full_attention": {"rope_type": "default"}}, r"\.full_attention is an object of its own, .* not supported"),
    ("yarn", "is 'yarn'; it must be an object, or null"),
]


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_refused_in_one_line(family: str, name: str) -> None:
    for rope, complaint in REFUSED:
        with pytest.raises(UserError, match=complaint) as error:
            model_config(SHAPE | {"model_type": family, name: rope})
        assert "\n" not in str(error.value) and str(error.value).startswith("config.json: ")


def test_what_is_read_as_before() -> None:
    for rope in (None, {}, SCALED, SCALED | {"factor": None, "beta_fast": 1.0, "mscale_all_dim": 0}, YARN):
        assert model_config(SHAPE | {"model_type": "deepseek_v3", "rope_scaling": rope}).rope_parameters["rope_theta"]
