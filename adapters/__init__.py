"""The LoRA adapter as a value: factors with their scale, algebra, wire form, PEFT files."""
