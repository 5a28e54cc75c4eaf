import typer

app = typer.Typer(help="Turn a data set into the one JSONL format.", no_args_is_help=True)
