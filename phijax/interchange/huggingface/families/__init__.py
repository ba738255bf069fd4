"""The classes of transformers that are read and written. A new one: a file here, and its line below."""

from phijax.interchange.huggingface.families import gpt2, llama, mistral, phi3
from phijax.interchange.huggingface.families.family import Family

# A checkpoint that names no class of its own is written as the first that can hold it.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (phi3.FAMILY, llama.FAMILY, mistral.FAMILY, gpt2.FAMILY)
}
