"""List the cached features, decoded images and unpacked archives, or delete some.

python -m tuner.cache                         # size, last use and content of each file
python -m tuner.cache --prune --days 30       # delete files unused for 30 days
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tuner import cache_files, output
from tuner.cache_files import format_bytes

CONTENT = {  # folder of the cache -> description of a file in it, from its key
    "banks": "{network} {block} pool={pool} {image_size} px {dtype}, {count:,} images",
    "images": "{shape} {fit}, {count:,} files of {root}",
    "archives": "unpacked from {archive}",
}


def banks(cache_dir: Path) -> Iterator[tuple[Path, str]]:
    """The files and folders of a cache, and what each holds, the longest unused first."""
    paths = [(path, what) for folder, what in CONTENT.items() for path in cache_files.files(cache_dir, folder)]
    for path, what in sorted(paths, key=lambda pair: pair[0].stat().st_mtime):
        try:
            what = what.format(**cache_files.key_of(path))
        except cache_files.UNREADABLE:
            what = "damaged"
        yield path, "unfinished" if path.suffix == ".partial" else what


def main() -> None:
    """List the files of the cache, or delete them with --prune, then print their total size."""
    parser = argparse.ArgumentParser(
        "python -m tuner.cache", description="List the cached features, images and unpacked archives, or delete some."
    )
    parser.add_argument(
        "--cache-dir", default=os.environ.get("TUNER_CACHE", "~/.cache/tuner"), help="default %(default)s"
    )
    parser.add_argument("--prune", action="store_true", help="delete files instead of listing them")
    parser.add_argument("--days", type=float, default=0, help="only files unused for so many days")
    args = parser.parse_args()
    cache_dir, total = Path(args.cache_dir).expanduser(), 0
    for path, what in banks(cache_dir):
        size, unused = cache_files.size_of(path), (time.time() - path.stat().st_mtime) / 86400
        if unused < (max(args.days, 1) if args.prune and what == "unfinished" else args.days):
            continue  # a run may still be writing an unfinished file younger than a day
        if args.prune:
            cache_files.remove(path)
        deleted = "deleted " if args.prune else ""
        output.print_text(f"{deleted}{path.name}  {format_bytes(size):>7}  used {unused:.1f} days ago  {what}")
        total += size
    print(f"{format_bytes(total)} {'freed' if args.prune else 'used'} in {cache_dir}")


if __name__ == "__main__":
    output.command(main)
