"""`python -m mmllm.cli COMMAND`, also under torchrun."""

from mmllm.cli.main import run_process

if __name__ == "__main__":
    run_process()
