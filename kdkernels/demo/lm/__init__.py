"""The demo of a language model: SmolLM2-135M-Instruct, a student of its layers. `python -m kdkernels.demo.lm`."""
