"""Golden cases of the multimodal model: text, images, data, training, the whole model."""
