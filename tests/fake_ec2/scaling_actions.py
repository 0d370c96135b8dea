"""EC2 Auto Scaling: groups whose instances are launched as all are, so real machines where there are any.

moto keeps groups, hooks and tags. Its groups of launch templates get the parts here: instances that come into
service once they run, hooks that hold an instance before its end, replacement of unhealthy ones.
Time is looked at with each call to the cloud, whatever its service.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from moto.autoscaling import models
from moto.autoscaling.models import FakeAutoScalingGroup, InstanceState, TerminateInstanceActivity
from moto.autoscaling.responses import AutoScalingResponse
from moto.core.responses import ActionResult, EmptyResult

from tests.fake_ec2.api_call import ACCOUNT, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moto.ec2.models.instances import Instance

_SERVING = ("Pending", "InService")
_TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"
_GROUP_TAG = "aws:autoscaling:groupName"
_STATE = "autoscaling/target-lifecycle-state"
# States in which EC2's status checks, which every group looks at, have failed.
_ENDED = frozenset({"stopping", "stopped", "shutting-down", "terminated"})


class Launcher(Protocol):
    """EC2, as the service-linked role of Auto Scaling calls it."""

    def now(self) -> float:
        """Return the time in seconds."""

    def run(self, region: str, settings: dict[str, Any], tags: dict[str, str]) -> Instance:
        """Launch one instance; raises Refused."""

    def terminate(self, region: str, instance_id: str) -> None:
        """Terminate an instance."""

    def announce(self, instance_id: str, path: str, value: str) -> None:
        """Set a value of an instance's metadata."""


@dataclass(slots=True, kw_only=True)
class _Course:
    """Where an instance is in its life in the group."""

    in_service: float = 0.0
    """When it came into service."""
    waits_for: list[str] = field(default_factory=list)
    """Hooks whose actions are not complete."""
    deadline: float = 0.0


class ScalingGroup(FakeAutoScalingGroup):
    """A group of instances from a launch template; one of a launch configuration stays moto's."""

    launcher: ClassVar[Launcher]
    refusals: list[str]
    """Why launches were refused."""
    _courses: dict[str, _Course]

    def set_desired_capacity(self, new_capacity: int | None) -> None:
        """Launch or terminate as many instances as it takes."""
        if not self._of_template():
            super().set_desired_capacity(new_capacity)
            return
        if not hasattr(self, "refusals"):
            self.refusals, self._courses, self._next = [], {}, count()
        wanted = int(self.min_size or 0) if new_capacity is None else int(new_capacity)
        if not int(self.min_size or 0) <= wanted <= int(self.max_size or 0):
            raise Refused(
                "ValidationError",
                f"New SetDesiredCapacity value {wanted} is not within {self.min_size} and {self.max_size}",
            )
        self.desired_capacity = wanted
        self.reconcile()

    def replace_autoscaling_group_instances(self, count_needed: int, propagated_tags: dict[str, str]) -> None:
        """Launch in place of instances that somebody terminated."""
        if not self._of_template():
            super().replace_autoscaling_group_instances(count_needed, propagated_tags)
            return
        self.reconcile()

    def reconcile(self) -> None:
        """Launch what is missing, and end what is too much, the oldest first."""
        serving = [one for one in self.instance_states if one.lifecycle_state in _SERVING]
        free = [one for one in serving if not one.protected_from_scale_in]
        for one in free[: max(0, len(serving) - int(self.desired_capacity or 0))]:
            self.end(one)
        for _ in range(int(self.desired_capacity or 0) - len(serving)):
            try:
                self._launch()
            except Refused as refused:
                # It tries again, as long as it has to.
                self.refusals.append(f"{refused.code}: {refused.message}")
                return

    def advance(self) -> None:
        """Do what time, and what became of the instances, has brought."""
        if not self._of_template():
            return
        now = self.launcher.now()
        for one in list(self.instance_states):
            course = self.course(one)
            state = one.instance.state
            if one.lifecycle_state == "Pending" and state == "running":
                one.lifecycle_state, course.in_service = "InService", now
            elif one.lifecycle_state in _SERVING and state in _ENDED:
                # behaviour: ended-instances-are-replaced
                self.instance_states.remove(one)
                if state in ("stopping", "stopped"):
                    self.launcher.terminate(self.region, one.instance.id)
            elif course.waits_for and now >= course.deadline:
                # behaviour: hook-timeout
                self.proceed(one)
        self.reconcile()

    def course(self, one: InstanceState) -> _Course:
        """Return where an instance is in its life here."""
        return self._courses.setdefault(one.instance.id, _Course())

    def end(self, one: InstanceState) -> None:
        """Terminate an instance, once the actions of all hooks are complete or late."""
        hooks = [
            hook
            for hook in self.autoscaling_backend.describe_lifecycle_hooks(self.name)
            if hook.lifecycle_transition == _TERMINATING
        ]
        # behaviour: target-lifecycle-state
        self.launcher.announce(one.instance.id, _STATE, "Terminated")
        if not hooks:
            self.proceed(one)
            return
        # behaviour: terminating-wait
        one.lifecycle_state = "Terminating:Wait"
        course = self.course(one)
        course.waits_for = [hook.name for hook in hooks]
        course.deadline = self.launcher.now() + min(int(hook.heartbeat_timeout) for hook in hooks)

    def proceed(self, one: InstanceState) -> None:
        """Terminate an instance now."""
        one.lifecycle_state = "Terminating:Proceed"
        self.course(one).waits_for = []
        if one in self.instance_states:
            self.instance_states.remove(one)
        self.launcher.terminate(self.region, one.instance.id)

    def _of_template(self) -> bool:
        return self.ec2_launch_template is not None and not self.mixed_instances_policy

    def _launch(self) -> None:
        # behaviour: template-version-at-launch
        assert self.ec2_launch_template is not None
        template = {
            "LaunchTemplateId": self.ec2_launch_template.id,
            "Version": str(self.launch_template_version),
        }
        settings: dict[str, Any] = {"LaunchTemplate": template}
        places = (self.vpc_zone_identifier or "").split(",")
        number = next(self._next)
        if places != [""]:
            settings["SubnetId"] = places[number % len(places)]
        else:
            zone = self.availability_zones[number % len(self.availability_zones)]
            settings["Placement"] = {"AvailabilityZone": zone}
        if propagated := self.get_propagated_tags():
            listed = [{"Key": key, "Value": value} for key, value in propagated.items()]
            settings["TagSpecifications"] = [{"ResourceType": "instance", "Tags": listed}]
        instance = self.launcher.run(self.region, settings, {_GROUP_TAG: self.name})
        instance.autoscaling_group = self  # type: ignore[attr-defined]
        self.launcher.announce(instance.id, _STATE, "InService")
        self.instance_states.append(
            InstanceState(
                instance,
                lifecycle_state="Pending",
                protected_from_scale_in=self.new_instances_protected_from_scale_in,
            )
        )


# moto makes its groups by this name.
models.FakeAutoScalingGroup = ScalingGroup  # type: ignore[misc]


def groups(region: str = "") -> Iterator[ScalingGroup]:
    """Yield the groups of a region, or of all."""
    for name, backend in list(models.autoscaling_backends[ACCOUNT].items()):
        if region in ("", name):
            yield from [one for one in backend.autoscaling_groups.values() if isinstance(one, ScalingGroup)]


def find_group(region: str, *, name: str = "", instance: str = "") -> ScalingGroup | None:
    """Return the group of this name, or the one that an instance is in."""
    return next(
        (
            group
            for group in groups(region)
            if group.name == name or any(one.instance.id == instance for one in group.instance_states)
        ),
        None,
    )


class ScalingActions(AutoScalingResponse):
    """The actions where moto does less or something else."""

    def set_instance_health(self) -> ActionResult:
        """SetInstanceHealth: an unhealthy instance is terminated and replaced, after its grace period."""
        group, one = self._instance()
        status = self._get_param("HealthStatus")
        now, came = group.launcher.now(), group.course(one).in_service
        grace = int(group.health_check_grace_period or 0)
        # behaviour: grace-period
        if self._get_bool_param("ShouldRespectGracePeriod", True) and (
            one.lifecycle_state == "Pending" or now - came < grace
        ):
            return EmptyResult()
        one.health_status = status
        if status == "Unhealthy" and one.lifecycle_state in _SERVING:
            # behaviour: unhealthy-is-replaced
            group.end(one)
            group.reconcile()
        return EmptyResult()

    def complete_lifecycle_action(self) -> ActionResult:
        """CompleteLifecycleAction, of a hook that holds the instance."""
        group, one, hook = self._held()
        course = group.course(one)
        course.waits_for.remove(hook)
        # behaviour: abandoned-termination
        if not course.waits_for or self._get_param("LifecycleActionResult") == "ABANDON":
            group.proceed(one)
        return EmptyResult()

    def record_lifecycle_action_heartbeat(self) -> ActionResult:
        """RecordLifecycleActionHeartbeat: the timeout begins again."""
        group, one, name = self._held()
        (hook,) = self.autoscaling_backend.describe_lifecycle_hooks(group.name, [name])
        group.course(one).deadline = group.launcher.now() + int(hook.heartbeat_timeout)
        return EmptyResult()

    def terminate_instance_in_auto_scaling_group(self) -> ActionResult:
        """TerminateInstanceInAutoScalingGroup, with hooks; replaced unless capacity is decremented."""
        group, one = self._instance()
        capacity = int(group.desired_capacity or 0)
        if self._get_bool_param("ShouldDecrementDesiredCapacity", False):
            group.desired_capacity = capacity - 1
        activity = TerminateInstanceActivity(one.instance, capacity)
        group.end(one)
        group.reconcile()
        return ActionResult({"Activity": activity})

    def delete_auto_scaling_group(self) -> ActionResult:
        """DeleteAutoScalingGroup: with instances only by force, which waits for no hook."""
        group = find_group(self.region, name=self._get_param("AutoScalingGroupName"))
        if group is None or not group._of_template():
            return super().delete_auto_scaling_group()
        # behaviour: force-delete
        if group.instance_states and not self._get_bool_param("ForceDelete", False):
            raise Refused(
                "ResourceInUse",
                "You cannot delete an AutoScalingGroup while there are instances or pending Spot instance"
                " request(s) still in the group.",
            )
        del self.autoscaling_backend.autoscaling_groups[group.name]
        for one in list(group.instance_states):
            group.launcher.announce(one.instance.id, _STATE, "Terminated")
            group.proceed(one)
        return EmptyResult()

    def _instance(self) -> tuple[ScalingGroup, InstanceState]:
        named = self._get_param("InstanceId")
        group = find_group(self.region, instance=named)
        if group is None:
            raise Refused("ValidationError", f"Instance Id not found - No managed instance found for {named}")
        return group, next(one for one in group.instance_states if one.instance.id == named)

    def _held(self) -> tuple[ScalingGroup, InstanceState, str]:
        named, hook = self._get_param("InstanceId"), self._get_param("LifecycleHookName")
        group = find_group(self.region, name=self._get_param("AutoScalingGroupName"))
        for one in group.instance_states if group is not None else ():
            assert group is not None
            if one.instance.id == named and hook in group.course(one).waits_for:
                return group, one, hook
        raise Refused("ValidationError", f"No active Lifecycle Action found with instance ID {named}")


def advance() -> None:
    """Let all groups do what is due."""
    for group in list(groups()):
        group.advance()
