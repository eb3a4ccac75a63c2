"""The text column of Parquet files, row group by row group."""

from collections.abc import Iterator

from stepline.trainer.errors import UserError


def group_sizes(path: str, text_key: str) -> list[int]:
    """Bytes of each row group; UserError when there is no such column of text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: `pip install 'stepline[data]'`") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a sound Parquet file ({error}); download it again") from error
    if schema.names.count(text_key) > 1:
        raise UserError(f"{path} has several columns '{text_key}'; name another one with --text-key")
    if text_key not in schema.names:
        raise UserError(
            f"{path} has no column '{text_key}' (it has {', '.join(schema.names)}); name the right one with --text-key"
        )
    kind = schema.field(text_key).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(inner) not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: the column '{text_key}' holds {kind}, not text; name the right one")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return [max(1, group.total_byte_size) for group in groups]


def group_texts(path: str, group: int, text_key: str) -> Iterator[str | None]:
    """The text of each row of a row group, None for a null."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[text_key]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a sound Parquet file ({error}); download it again") from error
