"""An HTTP server as OpenAI's clients know it: every request shares one continuous batch, and one thread the device."""
