"""What the presets change of the defaults in `config`."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "smoke": {  # seconds; for tests
        "town": dict(residents=12, documents=400, labeler_prompts=60, customer_prompts=120,
                     valid_prompts=40, test_prompts=40, demonstrations=40, valid_demonstrations=20),
        "pretrain": dict(vocab_size=512, layers=2, hidden=32, heads=2, steps=20, copy_steps=5,
                         batch_size=8, checkpoint_every=5),
        "sft": dict(epochs=2, min_eos_rate=0.0, checkpoint_every=2),
        "ranking": dict(prompts=24, valid_prompts=12, test_prompts=12, batch_size=64,
                        max_response_tokens=12),
        "reward": dict(epochs=1, batch_size=8, checkpoint_every=2),
        "ppo": dict(iterations=4, episodes=8, epochs=1, max_response_tokens=12, ptx_rows=2,
                    ptx_coef=1.0, checkpoint_every=1),
        "evaluation": dict(samples=1, bootstrap=200, max_response_tokens=12),
    },
    "cpu": {"ppo": dict(ptx_coef=1.0)},  # minutes; the defaults
    # A quarter of an hour on one large GPU, untuned: data/recorded/gpu. Where no source stands, a
    # guess. "Ziegler" is the released code of Ziegler et al. 2019 for GPT-2 124M.
    "gpu": {  # 32,000 prompts and 12,800 demonstrations (size x ...); paper: 31,144 and 12,725
        "town": dict(size=20, labeler_prompts=320, customer_prompts=1_280, valid_prompts=80,
                     test_prompts=80, demonstrations=640, valid_demonstrations=40),
        # sizes, init_std of GPT-2 124M, lr of GPT-3 125M; two passes over 16 million tokens
        "pretrain": dict(vocab_size=50_257, layers=12, hidden=768, heads=12, context=1024,
                         init_std=0.02, steps=1_200, copy_steps=200, batch_size=128,
                         row_tokens=256, lr=6e-4, checkpoint_every=600),
        "sft": dict(epochs=2, batch_size=32, lr=5e-5, dropout=0.2, checkpoint_every=400),
        "ranking": dict(prompts=16_000, valid_prompts=400, test_prompts=800, batch_size=1_024),
        "reward": dict(epochs=1, batch_size=64, lr=5e-5, checkpoint_every=250),  # lr: Ziegler
        # paper, but lr: Ziegler (paper: 2.55e-6 to 2.55e-5 tried), iterations, warm-up, kl_coef;
        # ema_decay reaches as far back, as a part of the run, as the paper's 0.992 in 500 rollouts
        "ppo": dict(iterations=40, episodes=512, minibatches=8, epochs=1, warmup_iterations=5,
                    lr=1e-5, value_lr=9e-6, ema_decay=0.9, ptx_coef=1.0, checkpoint_every=20),
        "evaluation": dict(batch_size=1_024),
        "compute": dict(dtype="bfloat16"),  # whether compile pays is not measured yet
    },
    # Your own data, in texts of real length: `real-cpu` in minutes from scratch (epochs chosen by
    # validation loss, kl_coef by training rollouts), `real` for GPT-2 on a GPU, untuned.
    "real-cpu": {
        "town": dict(residents=12, documents=400),
        "pretrain": dict(vocab_size=2_048, context=320, steps=900, copy_steps=150, batch_size=12,
                         row_tokens=320),  # the context: else its last positions learn nothing
        "sft": dict(max_prompt_tokens=128, max_response_tokens=192, min_eos_rate=0.7),
        "ranking": dict(max_response_tokens=192),
        "reward": dict(epochs=1, max_prompt_tokens=128, max_response_tokens=192),
        "ppo": dict(max_prompt_tokens=128, max_response_tokens=192, episodes=64, kl_coef=0.1),
        "evaluation": dict(max_response_tokens=192, batch_size=128),
    },
    "real": {
        "town": dict(residents=12, documents=400),
        "pretrain": dict(vocab_size=50_257, layers=12, hidden=768, heads=12, context=1024,
                         init_std=0.02, steps=1_500, copy_steps=200, batch_size=64,
                         row_tokens=1024, lr=6e-4, checkpoint_every=500),
        "sft": dict(batch_size=32, lr=1e-5, dropout=0.2, epochs=3, max_prompt_tokens=512,
                    max_response_tokens=384),
        "reward": dict(epochs=1, batch_size=16, lr=5e-5, max_prompt_tokens=512,
                       max_response_tokens=384),
        "ranking": dict(max_response_tokens=384),
        "ppo": dict(iterations=60, episodes=128, minibatches=8, epochs=1, warmup_iterations=10,
                    lr=1e-5, value_lr=9e-6, ema_decay=0.935, max_prompt_tokens=512,
                    max_response_tokens=384, checkpoint_every=20),
        "evaluation": dict(max_response_tokens=384, batch_size=128),
        "compute": dict(dtype="bfloat16"),
    },
}
