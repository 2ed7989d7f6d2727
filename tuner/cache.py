"""List the cached features, decoded images and unpacked archives, or delete some.

python -m tuner.cache                         # size, last use and content of each file
python -m tuner.cache --prune --days 30       # delete files unused for 30 days
python -m tuner.cache --limit 20GB            # delete files unused for longest, until the others take 20 GB
"""

from pathlib import Path

from tuner import arguments, cache_files, output, terminal
from tuner.cache_files import Entry, format_bytes
from tuner.rules import SIZE, as_bytes
from tuner.runs import readings

CONTENT = {  # folder of the cache -> description of a file in it, from its key
    "banks": "{network} {block} pool={pool} {image_size} px {dtype}, {count:,} images",
    "images": "{shape} {fit}, {count:,} files of {root}",
    "archives": "unpacked from {archive}",
}


def content(entry: Entry) -> str:
    """What a file or folder of a cache holds."""
    if entry.is_unfinished:
        return "unfinished"
    try:
        return CONTENT[entry.path.parent.name].format(**cache_files.key_of(entry.path))
    except cache_files.UNREADABLE:
        return "damaged"


def main() -> None:
    """List the files of the cache, or delete them with --prune or --limit, then print their total size."""
    parser = arguments.cache()
    args = parser.parse_args()
    if args.limit is not None:
        if args.prune or args.days:
            parser.error("--limit chooses the files to delete itself: leave --prune and --days out")
        SIZE.check("--limit", args.limit)
    folder, total = Path(args.cache_dir or cache_files.machine_cache()).expanduser(), 0
    contents = {entry: content(entry) for entry in cache_files.entries(folder)}
    if args.limit is not None:
        chosen, left = cache_files.evict(folder, as_bytes(args.limit))
    else:
        chosen = [entry for entry in contents if _is_chosen(entry, args.days, args.prune)]
    for entry in chosen:
        if args.prune:
            cache_files.remove(entry.path)
        deleted = "deleted " if args.prune or args.limit else ""
        size, days = format_bytes(entry.size), entry.days_unused
        output.print_text(
            f"{deleted}{entry.path.name}  {size:>7}  used {days:.1f} days ago  {contents.get(entry, 'new')}"
        )
        total += entry.size
    if args.limit is None and not args.prune:
        for split_hash, read in readings.of_cache(folder).items():
            print(f"the test split {split_hash} {read} (a record that is kept)")
    done = f"freed, {format_bytes(left)} used" if args.limit else "freed" if args.prune else "used"
    print(f"{format_bytes(total)} {done} in {folder}")
    if args.limit is not None and left > as_bytes(args.limit):
        print(f"the rest, more than {args.limit}, is in use or was used within a day")


def _is_chosen(entry: Entry, days: float, prune: bool) -> bool:
    """Whether a file is listed, or deleted. A run may still be writing an unfinished file younger than a day."""
    return entry.days_unused >= (max(days, 1) if prune and entry.is_unfinished else days)


if __name__ == "__main__":
    terminal.command(main)
