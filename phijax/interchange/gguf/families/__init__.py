"""The architectures of GGUF files that are read and written. A new one: a file here, and its line below."""

from phijax.interchange.gguf.families import gpt2, llama, phi3
from phijax.interchange.gguf.families.family import Family

# A checkpoint of no class that a file here names is written as the first that can hold it.
FAMILIES: dict[str, Family] = {family.architecture: family for family in (phi3.FAMILY, llama.FAMILY, gpt2.FAMILY)}
