"""What a distillation reads: chats and documents, in domains, made into batches; and text that the teacher writes."""
