"""What a personalised model is worth: accuracy, loss, answers, ROUGE, METEOR."""
