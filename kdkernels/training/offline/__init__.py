"""What is made once, before training, and read by it: responses of both models, and a judge's scores of them."""
