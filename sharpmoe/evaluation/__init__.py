"""What a trained model is measured by: allocation, distances, alignment."""
