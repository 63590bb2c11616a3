"""Our encoders as models of other evaluation libraries. They are optional; nothing else imports them."""
