"""The agent: stable-baselines3 PPO, started from a known policy, saved without pickle (METHODS 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from ffprune.allocate.env import PolicyEnv
from ffprune.allocate.imagined import Imagined
from ffprune.core.errors import ParameterError

World = PolicyEnv | Imagined
"""Asks the agent for policies."""


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of the agent.

    Attributes:
        actor: hidden widths of the policy network (ReLU).
        critic: hidden widths of the value network.
        learning_rate: of Adam.
        clip: PPO's clip range.
        episodes_per_update: samples per update.
        epochs: passes over them.
        noise: initial standard deviation of a score.
    """

    actor: tuple[int, ...]
    critic: tuple[int, ...]
    learning_rate: float
    clip: float
    episodes_per_update: int
    epochs: int
    noise: float


PRESETS: dict[str, Preset] = {
    # Thousands of episodes from no knowledge: FF section 3.1 (its samples per update are not given: SS's).
    "fastforward": Preset((256, 128), (256, 128), 1e-4, 0.2, 15, 10, 1.0),
    # SS section 4, Setup.
    "sparsitysolver": Preset((256, 256), (64, 64), 5e-4, 0.2, 15, 10, 1.0),
    # About a hundred episodes from a good start: larger steps, less noise.
    "warm": Preset((256, 128), (256, 128), 1e-2, 0.2, 16, 10, 0.3),
    # Episodes on a model of the reward, as departures from the policy that is best by the sum of curves.
    "guided": Preset((256, 128), (256, 128), 3e-3, 0.2, 64, 5, 0.1),
}


class _Settled(BaseCallback):
    """Puts rewards that come at the end of an update (:meth:`PolicyEnv.settle`) where those of the steps are.

    Args:
        env: the environment.
        buffer: the agent's steps.
    """

    def __init__(self, env: World, buffer: RolloutBuffer) -> None:
        super().__init__()
        self._env, self._buffer = env, buffer

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        rewards = self._env.settle()
        if rewards:
            # An episode's reward is that of its last step; what was computed of no rewards is computed again.
            self._buffer.rewards[self._env.steps - 1 :: self._env.steps, 0] = rewards
            self._buffer.compute_returns_and_advantage(self.locals["values"], self.locals["dones"])


class Agent:
    """PPO over a :data:`World`, driven one update at a time so that it can be saved between updates.

    Args:
        env: the environment.
        preset: hyper-parameters.
        seed: of the networks and of the exploration.
        start: float64 ``[N]`` scores (for an environment that asks unit by unit: one for all, ``[1]``) that the
            untrained policy gives at the problem's final sparsity; None starts from nothing (scores near 0).
    """

    def __init__(self, env: World, preset: Preset, seed: int, start: NDArray[np.float64] | None = None) -> None:
        self.preset, self.env = preset, env
        self._steps = preset.episodes_per_update * env.steps
        side_by_side = env.num_envs if isinstance(env, Imagined) else 1
        self._ppo = PPO(
            "MlpPolicy",
            env,
            learning_rate=preset.learning_rate,
            n_steps=self._steps // side_by_side,
            batch_size=self._steps,
            n_epochs=preset.epochs,
            # Every step of an episode is credited with its whole reward, as in AMC.
            gamma=1.0,
            gae_lambda=1.0,
            clip_range=preset.clip,
            seed=seed,
            device="cpu",
            policy_kwargs={
                "net_arch": {"pi": list(preset.actor), "vf": list(preset.critic)},
                "activation_fn": nn.ReLU,
                "log_std_init": float(np.log(preset.noise)),
            },
        )
        # Without a logger of its own, learn() leaves an empty folder in the temporary directory at every call.
        self._ppo.set_logger(Logger(folder=None, output_formats=[]))
        if start is not None:
            offset = start - self.act(env.final)
            layer: Any = self._ppo.policy.action_net
            with torch.no_grad():
                layer.bias += torch.as_tensor(offset, dtype=torch.float32)

    def update(self) -> None:
        """Run the episodes of one update, then learn from them."""
        self._ppo.learn(self._steps, _Settled(self.env, self._ppo.rollout_buffer), reset_num_timesteps=False)

    def act(self, observation: NDArray[np.float32]) -> NDArray[np.float64]:
        """The mean action at an observation of the environment."""
        action, _ = self._ppo.predict(observation, deterministic=True)
        return np.asarray(action, dtype=np.float64)

    def scores(self, sparsity: float) -> NDArray[np.float64]:
        """The mean action at a target sparsity, float64 ``[N]`` (single-step environment)."""
        return self.act(np.array([sparsity], dtype=np.float32))

    def weights(self) -> dict[str, Tensor]:
        """Networks and optimiser: what a transfer carries over (FF 2.2, SS Table 6)."""
        policy = self._ppo.policy
        tensors = {f"policy.{name}": t.detach().clone() for name, t in policy.state_dict().items()}
        for index, slots in policy.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": t.detach().clone() for slot, t in slots.items()}
        return tensors

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`weights` gave.

        Raises:
            ParameterError: the tensors are those of another agent (other units or widths).
        """
        policy = self._ppo.policy
        networks = {k.removeprefix("policy."): t for k, t in tensors.items() if k.startswith("policy.")}
        try:
            policy.load_state_dict(networks)
        except RuntimeError as error:
            raise ParameterError(
                "a trained agent with other tensor shapes was to be continued",
                f"This agent has widths {self.preset.actor} and {len(self.env.problem.units)} units",
                "Use the same search.agent and the same model, or search again",
            ) from error
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, slot = key.split(".")
                moments.setdefault(int(index), {})[slot] = tensor.clone()
        policy.optimizer.load_state_dict({**policy.optimizer.state_dict(), "state": moments})

    def state(self) -> dict[str, Tensor]:
        """Weights, random generators and counters: enough to go on as if never stopped (same CPU)."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - SB3's own
        if kind != "MT19937":
            raise RuntimeError(f"unexpected numpy generator {kind}")
        return {
            **self.weights(),
            "rng.torch": torch.get_rng_state(),
            "rng.numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rng.numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
            "counters": torch.tensor([self._ppo.num_timesteps, self._ppo._n_updates, self.env.episode]),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.load_weights(tensors)
        torch.set_rng_state(tensors["rng.torch"])
        position, has_gauss, gauss = tensors["rng.numpy_rest"].tolist()
        keys: Any = tensors["rng.numpy_keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002 - SB3's own
        self._ppo.num_timesteps, self._ppo._n_updates, self.env.episode = (
            int(value) for value in tensors["counters"].tolist()
        )
