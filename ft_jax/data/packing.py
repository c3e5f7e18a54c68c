"""Several examples in one row of fixed length: first-fit packing with segments."""

import grain
import numpy as np
from tqdm import tqdm

# Rows that are open at a time: more fill better and cost more.
BINS = 128


def pack(arrays, length, pad_id, name=""):
    """``({input_ids, segment_ids, positions, loss_mask}, info)``, all int32 ``[rows, length]``.

    ``arrays`` is what ``tokenise`` gives, no row longer than ``length``. Segments count from 1 within a row (0 is
    padding), positions restart in each, loss_mask is 1 where the token is a prediction target: never a segment's
    first token nor a prompt. Deterministic: rows in the order of the source. info: rows, filled (share of tokens).
    """
    offsets, ids = arrays["offsets"], arrays["ids"]

    def example(k):
        row = np.asarray(ids[offsets[k] : offsets[k + 1]])
        return {"input_ids": row, "loss_mask": (np.arange(len(row)) >= max(1, arrays["starts"][k])).astype(np.int32)}

    count = len(offsets) - 1
    examples = grain.MapDataset.range(count).map(example).to_iter_dataset(grain.ReadOptions(num_threads=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"input_ids": length, "loss_mask": length},
        num_packing_bins=min(BINS, count),
        shuffle_bins=False,
        padding_struct={"input_ids": pad_id, "loss_mask": 0},
    )
    rows = [row for row in tqdm(packed, desc=f"pack {name}", unit="row", leave=False)
            if row["input_ids_segment_ids"].any()]
    fields = {"input_ids": "input_ids", "segment_ids": "input_ids_segment_ids", "positions": "input_ids_positions",
              "loss_mask": "loss_mask"}
    out = {ours: np.stack([row[theirs] for row in rows]).astype(np.int32) for ours, theirs in fields.items()}
    return out, {"rows": len(rows), "filled": float((out["segment_ids"] > 0).mean())}
