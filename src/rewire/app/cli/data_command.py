"""The command `rewire data`."""

from __future__ import annotations


def data() -> None:
    """List the data sets that have a name, and what else --data takes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from rewire.app.data import REGISTERED
    from rewire.app.data.files import ENDINGS

    table = Table("name", "from", "what it is", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for name, entry in REGISTERED.items():
        table.add_row(name, entry.source, entry.summary)
    Console(highlight=False, markup=False).print(table)
    print(f"--data also takes a file ({', '.join(ENDINGS)}),")
    print("a folder of images with a subfolder for each class (write it with a slash: photos/),")
    print("sklearn:NAME, and path.to.module:function")
