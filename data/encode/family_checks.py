"""Whether clips and captions can be encoded for a family, before anything is loaded."""

from collections.abc import Sequence

from data.bucket import Bucket
from data.families import COGVIDEOX, MOCHI, VideoFamily
from data.stream.shard_index import IndexedShards, bucket_names


def check_sizes(sources: Sequence[IndexedShards], family: VideoFamily) -> None:
    """Checks that the clips of video shards have sizes that a family takes.

    Raises:
        ValueError: if a bucket does not.
    """
    for source in sources:
        for name in bucket_names([source]):
            try:
                Bucket.parse(name, family.name)
            except ValueError as error:
                raise ValueError(
                    f"{source.folder} holds clips of {name} for {source.family.title}, which {family.title} does not "
                    f"take: {error} Pack the clips for this base with `reblock pack --family {family.name}`."
                ) from error


def check_text_tokens(family: VideoFamily, text_tokens: int, max_tokens: int | None) -> int:
    """The number of tokens at which captions are cut.

    Args:
        family: of the base.
        text_tokens: of the longest caption that its transformer takes.
        max_tokens: asked for; None takes `text_tokens`.

    Raises:
        ValueError: if the family's transformer takes no captions of this length.
    """
    if max_tokens is None:
        return text_tokens
    if family is COGVIDEOX and max_tokens != text_tokens:
        raise ValueError(
            f"got max_text_tokens {max_tokens}, expected {text_tokens}: all captions of this CogVideoX have that "
            "length. Leave max_text_tokens out."
        )
    if family is not MOCHI and max_tokens > text_tokens:
        raise ValueError(f"got max_text_tokens {max_tokens}, expected at most {text_tokens} for {family.title}.")
    return max_tokens
