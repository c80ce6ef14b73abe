"""The Trainer: the surface of Hugging Face's Trainer 4.57 over the functions of trainkit."""
