"""Lists the commands: `python -m lstm_jax`."""

# By name and in words here: a command's own help imports JAX, which takes seconds.
COMMANDS = {
    "main": "train a model",
    "evaluate": "measure a trained model on a text",
    "sample": "let a trained model generate text",
    "inspect": "see what the cells of a trained model respond to, as a page",
    "convert": "read and write the weights of Keras and PyTorch",
    "sweep": "search for good settings, or train several seeds",
}

if __name__ == "__main__":
    for name, purpose in COMMANDS.items():
        print(f"python -m lstm_jax.{name:<10}{purpose}")
    print("\nEach explains its flags with --help.")
