"""SharpMoE: saliency-guided post-training of mixture-of-experts diffusion transformers."""
