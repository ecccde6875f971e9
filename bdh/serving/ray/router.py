"""Which replica a request goes to. Ray takes this module to its proxies as it is, by value."""

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from bdh.serving.ray import proxy_middleware
from bdh.serving.sessions.ids import place_of_replica

NEWS_SECONDS = 1.0  # for a proxy to hear of a replica that another proxy knows


class PlaceRouter(RequestRouter):
    """Sends what belongs to a replica there, and all else to the one of two that has less to do.

    Where that replica is no more, any other will do: it answers that what it is asked for is gone. A request waits for
    nobody in a queue here, so unlike Ray's own router this one never gives one request what was found for another.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ever: set[str] = set()  # places

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self.ever.update(place_of_replica(replica.replica_id.unique_id) for replica in replicas)
        proxy_middleware.present.replicas = len(self.curr_replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        proxy_middleware.present.replicas = len(self.curr_replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            if place := pending_request.metadata.session_id:
                for replica in candidate_replicas:
                    if place_of_replica(replica.replica_id.unique_id) == place:
                        return [[replica]]
                if place not in self.ever and time.time() - pending_request.created_at < NEWS_SECONDS:
                    return []
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
