"""What training a tokenizer needs: config, plan, images, losses, discriminator."""
