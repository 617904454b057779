"""List the commands: `python -m lstm_jax`."""

# Their names and purposes are written here, because importing the commands takes seconds.
COMMANDS = {
    "main": "train a model",
    "evaluate": "measure a trained model on a text",
    "sample": "generate text with a trained model",
    "inspect": "show what the hidden units of a trained model respond to, as a page",
    "convert": "read and write the weights of Keras and PyTorch, and write ONNX",
    "export": "put a trained model into a web page, where it generates text",
    "sweep": "search for good settings, or train several seeds",
}

if __name__ == "__main__":
    for name, purpose in COMMANDS.items():
        print(f"python -m lstm_jax.{name:<10}{purpose}")
    print("\nEach explains its flags with --help.")
