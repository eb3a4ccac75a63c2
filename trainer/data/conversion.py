"""A sentencepiece model as a tokenizer of Hugging Face."""

from pathlib import Path

from stepline.trainer.data.tokenizer import SPACE_MARK


def from_sentencepiece(proto: bytes):
    """A `tokenizers.Tokenizer` of a BPE model.

    Raises ValueError where the model has what BPE of `tokenizers` has not, ImportError without `tokenizers`.
    """
    import sentencepiece as spm
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    model = spm.SentencePieceProcessor(model_proto=proto)
    ids = range(model.get_piece_size())
    pieces = [model.id_to_piece(i) for i in ids]
    if any(len(piece) > 1 and model.is_unused(i) for i, piece in enumerate(pieces)):
        raise ValueError("it has pieces that are not used")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    scores = [model.get_score(i) for i in ids]
    plain = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    merges = []
    for i in plain:
        piece = pieces[i]
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                # sentencepiece merges to the piece of the best score first; several ways lead to one
                merges.append((-scores[i], left, right))
    merges.sort()
    fast = FastTokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(pieces[left], pieces[right]) for _, left, right in merges],
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = [normalizers.Replace(" ", SPACE_MARK)]
    if model.encode("a", out_type=str)[0].startswith(SPACE_MARK):  # a text begins as if after a space
        steps.append(decoders.Strip(" ", 1, 0))
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
    fast.normalizer = normalizers.Sequence(spaces)
    fast.decoder = decoders.Sequence(steps)
    special = [pieces[i] for i in ids if model.is_control(i) or model.is_unknown(i)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    fast.encode_special_tokens = True  # as for Stepline, a special token's name in a text is ordinary text
    return fast


def is_converted(file: Path, proto: bytes) -> bool:
    """Whether a sound tokenizer.json is just what `from_sentencepiece` makes of a model; raises ImportError."""
    from tokenizers import Tokenizer as FastTokenizer

    try:
        made = from_sentencepiece(proto)
    except ImportError:
        raise
    except (
        Exception
    ):  # a model without such a form, or none at all; what `tokenizers` raises is a bare Exception
        return False
    # The file is read and written again: another version of the library may have written it.
    return FastTokenizer.from_file(str(file)).to_str() == made.to_str()
