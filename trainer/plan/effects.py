"""What a config does that nobody would ask for, in words before the first step. Imports no torch."""

from stepline.comm.chunking import Chunking, kept_of
from stepline.trainer.config import Config


def unwanted_effects(config: Config) -> list[str]:
    """A sentence for each."""
    return untrained_router(config) + moved_embeddings(config) + coarse_inverse(config)


def repeated_corpus(budget: float, corpus: int | None) -> list[str]:
    """Where a budget of training tokens is more than the corpus has."""
    if not corpus or budget <= 1.01 * corpus:
        return []
    return [
        f"the budget of {budget:,.0f} tokens repeats the corpus of {corpus:,} {budget / corpus:.1f} times"
    ]


def nobody_to_agree_with(config: Config, world: int) -> list[str]:
    """Where a synchroniser of slow links has one replica, whose updates it makes coarser all the same."""
    sync = config.parallel.sync
    if sync == "all_reduce" or world > config.parallel.shard:
        return []
    more = ", and a smaller parallel.shard makes several of these ranks" if world > 1 else ""
    return [
        f"parallel.sync={sync} has one replica, which nothing is sent to and whose updates are {sync}'s all the same; "
        f"all_reduce trains it without them{more}"
    ]


def empty_windows(config: Config, world: int) -> list[str]:
    """Where a micro-batch is larger than what a rank has of a batch: it is filled up with windows without loss."""
    windows, micro_batch = config.budget.batch_tokens // config.data.seq_len, config.parallel.micro_batch
    share = -(-windows // world)
    if micro_batch <= share:
        return []
    return [
        f"parallel.micro_batch={micro_batch} is more than the {share} {'window' if share == 1 else 'windows'} that a "
        f"rank has of each batch: {micro_batch - share} are computed for nothing; lower it, or raise "
        "budget.batch_tokens"
    ]


def untrained_router(config: Config) -> list[str]:
    """Where a mixture's loss says nothing to its router: the one chosen expert's weight is then always 1."""
    moe = config.model.moe
    if config.model.ffn != "moe" or moe.top_k > 1 or not moe.renormalise:
        return []
    return [
        "with model.moe.top_k=1 and model.moe.renormalise every weight is 1, and the loss does not train the router; "
        "set model.moe.renormalise=false"
    ]


def moved_embeddings(config: Config) -> list[str]:
    """Where DeMo's signs would move rows of the embedding that had no gradient: zeros are among the values that travel
    of a chunk, and a sign is no zero."""
    demo, width = config.parallel.demo, config.model.hidden_size
    chunk = Chunking.flat((config.model.vocab_size, width), demo.side**2).width
    kept = kept_of(chunk, demo.density, demo.kept)
    if config.parallel.sync != "demo" or demo.faithful or demo.codec != "sign" or kept <= width:
        return []
    return [
        f"DeMo sends {kept} of every {chunk} values of embedding and head, more than a row's {width}: as signs "
        "they move rows that had no gradient too; lower parallel.demo.density or set parallel.demo.codec=int8"
    ]


def coarse_inverse(config: Config) -> list[str]:
    """Where a fixed point is sought among values of 8 bits: a value that rounds otherwise moves it."""
    model = config.model
    if model.blocks != "revffn" or model.coupling != "revffn" or not config.precision.fp8:
        return []
    return [
        "with precision.fp8 the blocks of model.coupling=revffn are inverted only as well as 8 bits allow: gradients "
        "are off by up to about as much as FP8 itself puts them off; those of model.coupling=exact are not"
    ]
