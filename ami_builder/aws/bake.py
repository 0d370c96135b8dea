"""Bakes an AMI from inputs: the container, then amazon-ebs of Packer in a security group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import tenacity

from ami_builder.aws import (
    hints,
    images,
    instances,
    network,
    orphans,
    packer_limits,
    packer_messages,
    packer_variables,
    presence,
    root_device,
    source_ami,
    tags,
    user_data,
)
from ami_builder.aws.session import Account, look_for
from ami_builder.build import container, packer, plugins
from ami_builder.build.inputs import Inputs
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import AmiBuilderError, BuildFailed, CloudFailed, Interrupted, TimedOut
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from ami_builder.core.units import GIB
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger, LedgerEntry
from ami_builder.state.workspace import Run, Workspace
from ami_builder.system import ssh

SOURCE = packer.Source(
    type="amazon-ebs",
    template="amazon.pkr.hcl",
    # 1.3.9 is what Packer 1.9 to 1.13 find; later releases are published for 1.14 and later alone.
    plugin=plugins.Plugin(name="amazon", oldest=(1, 3, 9)),
    # EC2 refuses a profile that does not exist. Packer would ask IAM, with the endpoint of EC2.
    more="""\
skip_profile_validation = true
""",
    newer="""\
metadata_options {
  http_endpoint               = "enabled"
  http_tokens                 = "required"
  http_put_response_hop_limit = 1
}
# The fleet that launches a spot instance.
fleet_tags = var.spot ? var.run_tags : null
""",
)
# How often ami-builder looks at the AMI once bake.timeout is over.
_LOOK_SECONDS = 60.0
# How long Packer may then take to see that an AMI is available: it looks every two minutes at most.
_LATE_SECONDS = 300.0
ATTEMPTS = 5
PAUSE = tenacity.wait_exponential_jitter(initial=1, max=20)


def bake_ami(
    inputs: Inputs,
    base: source_ami.BaseAmi,
    account: Account,
    workspace: Workspace,
    run: Run,
    step: Step,
    *,
    public: bool,
) -> images.Ami:
    """Bake an AMI from a base and finish it. Nothing else of the run remains in the account.

    Raises CloudFailed, BuildFailed, MissingTool, UsageError, TimedOut.
    """
    image = inputs.image
    plugins.require(SOURCE.plugin, run.work, run.log("packer"))
    for limit in packer_limits.limits(account, image.aws, SOURCE.plugin):
        raise limit
    kinds = _types(image, account, step)
    _look_at_credentials(image, account, step)
    with step.step("container") as child:
        upload = container.prepare(inputs.image, inputs.container_digest, workspace, run, child)
    bake = _Bake(inputs, base, account, kinds, upload, run)
    try:
        ami = bake.run(step)
        with step.step("finish the AMI") as child:
            done = finish(inputs, account, ami, bake.ledger, child, public=public)
            child.done(f"{done.id}, {done.size // GIB} GiB")
    except Interrupted:
        bake.drop()
        raise
    return done


def finish(
    inputs: Inputs, account: Account, ami: images.Ami, ledger: Ledger, step: Step, *, public: bool
) -> images.Ami:
    """Wait for an AMI of ours and finish it: root device, tags, IMDSv2 only, private or `public`."""
    whole = images.wait_available(account, ami.id, images.AVAILABLE_SECONDS, step.update)
    run_id = ami.tags.get(tags.RUN) or root_device.final_name(ami.name).removeprefix(
        tags.ami_name(inputs.image.name, inputs.digest, "")
    )
    tagged = packer_variables.image_tags(inputs, run_id)
    final = root_device.renamed(account, ledger, whole, inputs.image.aws.root_device, tagged)
    return images.finish(account, final.id, tagged, public=public)


def _types(image: Image, account: Account, step: Step) -> Sequence[str]:
    """Return the instance types that the region offers, and say which it does not. Raises UsageError."""
    setting, wanted = "aws.instance_types", image.aws.instance_types
    kinds = instances.require_offered(account, wanted, setting)
    if unknown := [kind for kind in wanted if kind not in kinds]:
        step.announce(f"{setting}: {account.region} does not offer {', '.join(unknown)}")
    instances.require_arch(account, kinds, image.arch, setting)
    return kinds


def _look_at_credentials(image: Image, account: Account, step: Step) -> None:
    """Say when the credentials end before a bake may."""
    left = account.seconds_left()
    if left is not None and left < image.bake.timeout:
        step.announce(
            f"the AWS credentials end in {left / 60:.0f} minutes and can't be refreshed; a bake may take"
            f" {image.bake.timeout / 60:.0f} (bake.timeout)"
        )


class _Bake:
    def __init__(
        self,
        inputs: Inputs,
        base: source_ami.BaseAmi,
        account: Account,
        kinds: Sequence[str],
        upload: Path | None,
        run: Run,
    ) -> None:
        self.inputs, self.base, self.account, self.run_ = inputs, base, account, run
        self.aws = inputs.image.aws
        self.kinds, self.upload = kinds, upload
        self.run_id = run.record.run_id
        self.final_name = tags.ami_name(inputs.image.name, inputs.digest, self.run_id)
        registers = root_device.differs(base, self.aws.root_device)
        self.name = root_device.baked_name(self.final_name) if registers else self.final_name
        self.ledger = Ledger(run.directory / LEDGER)
        self.instance = ""
        self.ami = ""
        self.imaging = False
        # Why it can't be required of the instance yet; None once it is.
        self.imdsv1: AmiBuilderError | None = None

    def drop(self) -> None:
        """Deregister unfinished AMIs, if that is allowed; otherwise the ledger has them."""
        with suppress(AmiBuilderError):
            left = [look_for(self._made) if self.imaging else self._made()]
            if self.name != self.final_name:
                left.append(images.find_by_name(self.account, self.final_name))
            for found in left:
                if found is not None and not found.finished:
                    orphans.delete_image(self.account, found.id, self.run_id)

    def _made(self) -> images.Ami | None:
        # By name: another host may have baked the same digest.
        return images.find_by_name(self.account, self.name)

    def run(self, step: Step) -> images.Ami:
        key = ssh.generate_key(self.run_.work)
        data = user_data.with_lifetime("", self.aws.lifetime, key.with_suffix(".pub").read_text())
        data_file = self.run_.work / "user-data"
        data_file.write_text(data)
        missing: list[str] = []
        for kind, subnet in product(self.kinds, self.aws.subnets or ("",)):
            try:
                with step.step("bake with Packer", detail=f"{kind} in {self.account.region}") as child:
                    self._with_packer(kind, subnet, key, data_file, child)
            except CloudFailed as failed:
                if not packer_messages.lacks_capacity("\n".join((failed.message, *failed.tail))):
                    raise
                missing.append(f"{kind}{f' in {subnet}' if subnet else ''}: {failed.message}")
                continue
            found = look_for(self._made)
            if found is None:
                raise CloudFailed(
                    f"Packer succeeded, but there is no AMI {self.name}", log=self.run_.log("packer")
                )
            return found
        raise CloudFailed(
            f"EC2 has no capacity in {self.account.region} for any of these",
            hint=hints.NO_CAPACITY,
            tail=tuple(missing),
        )

    def _with_packer(self, kind: str, subnet: str, key: Path, data_file: Path, step: Step) -> None:
        group = network.security_group(
            self.account,
            self.ledger,
            self.aws,
            run_id=self.run_id,
            purpose=tags.Purpose.BAKE,
            tags=packer_variables.bake_tags(self.inputs, self.run_id),
            subnets=[subnet] if subnet else [],
        )
        with group as group_id:
            variables = packer_variables.of_bake(
                self.inputs,
                self.base,
                self.account,
                self.run_,
                name=self.name,
                kind=kind,
                subnet=subnet,
                group=group_id,
                key=key,
                user_data=data_file,
            )
            retrying = tenacity.Retrying(
                retry=tenacity.retry_if_exception(self._nothing_was_made),
                stop=tenacity.stop_after_attempt(ATTEMPTS),
                wait=PAUSE,
                reraise=True,
            )
            retrying(self._build, variables, step)

    def _nothing_was_made(self, error: BaseException) -> bool:
        """Return whether Packer failed for a transient reason, before there was an instance."""
        if not isinstance(error, CloudFailed) or isinstance(error.__cause__, packer.PluginCrashed):
            return False
        if self.instance:
            return False
        # Packer makes some calls before it creates anything, and never retries them.
        return packer_messages.is_transient("\n".join((error.message, *error.tail)))

    def _build(self, variables: Mapping[str, packer.Variable], step: Step) -> None:
        stage = self.run_.directory / "packer"
        if not stage.exists():
            packer.stage(
                stage,
                SOURCE,
                self.inputs.guest,
                variables,
                uploads=[self.upload] if self.upload is not None else [],
            )
            packer.validate(stage, self.run_.log("packer"))
        else:
            packer.set_variables(stage, variables)
        # Written before Packer creates them.
        instance = self.ledger.intend(Resource.INSTANCE, self.account.region, run=self.run_id)
        # Only Packer knows its name, but it has the run's tag.
        template = (
            self.ledger.intend(Resource.LAUNCH_TEMPLATE, self.account.region, run=self.run_id)
            if self.aws.spot
            else None
        )
        image = self.ledger.intend(Resource.IMAGE, self.account.region, run=self.run_id, name=self.name)
        self.instance = self.ami = ""
        try:
            self._packer(stage, instance, image, step)
        except (AmiBuilderError, Interrupted) as failed:
            if not self._settle(instance, template):
                failed.hint = f"{failed.hint}; {hints.GC}" if failed.hint else hints.GC
            raise
        self._settle(instance, template)

    def _packer(self, stage: Path, instance: LedgerEntry, image: LedgerEntry, step: Step) -> None:
        """Run Packer, and record what it creates."""
        log = self.run_.log("packer")
        began = time.monotonic()
        imaging_after = pending_at = 0.0

        def limit() -> float:
            nonlocal pending_at
            timeout, gone = self.inputs.image.bake.timeout, time.monotonic() - began
            if not self.imaging or gone < timeout:
                return timeout
            # EC2 makes the snapshot, and takes its time.
            if gone < imaging_after + images.AVAILABLE_SECONDS and self._is_pending():
                pending_at = gone
                return gone + _LOOK_SECONDS
            return max(timeout, pending_at + _LATE_SECONDS if pending_at else 0.0)

        def read(line: str) -> None:
            nonlocal imaging_after
            if packer_messages.is_imaging(line) and not self.imaging:
                imaging_after = time.monotonic() - began
                self.imaging = True
            if (found := packer_messages.instance_in(line)) and not self.instance:
                self.instance = found
                self.ledger.made(instance, self.instance)
                with suppress(AmiBuilderError):
                    if self.aws.spot:
                        orphans.tag(
                            self.account, self.instance, self.run_id, appears=presence.VISIBLE_SECONDS
                        )
                # 1.6.6 can't ask for it at the launch.
                self.imdsv1 = None if plugins.has_plugins() else CloudFailed("not tried")
            elif (found := packer_messages.image_in(line)) and not self.ami:
                self.ami = found
                self.ledger.made(image, self.ami)
            if self.instance and self.imdsv1 is not None and not self.imaging:
                self._require_imdsv2(step, last=packer_messages.has_booted(line))

        with self.account.environment("ec2", "sts", *self._more_services()) as credentials:
            try:
                packer.build(
                    stage,
                    log=log,
                    console_log=log,
                    timeout=limit,
                    on_progress=step.update,
                    on_line=read,
                    env=credentials.variables,
                )
            except packer.PluginCrashed as crashed:
                if self.instance or not self.aws.spot:
                    raise
                # A mistake of plugin 1.8: what EC2 answered to CreateFleet is lost.
                raise CloudFailed(
                    "EC2 refused the request for a spot instance, and Packer's plugin crashed on that",
                    hint="try again later, set aws.spot to false, or see EC2's reason with plugin amazon"
                    " 1.7.1",
                    log=crashed.log,
                    tail=crashed.tail,
                ) from crashed
            except TimedOut as late:
                refused = self._refused()
                if refused is None or not hints.is_expired(refused.message):
                    raise
                raise CloudFailed(
                    "the AWS credentials expired while Packer waited",
                    hint=hints.LOGIN,
                    log=late.log,
                    tail=late.tail,
                ) from late
            except BuildFailed as failed:
                text = "\n".join((failed.message, *failed.tail))
                if self.ami and packer_messages.lost_the_image(text):
                    # All that Packer had left to do is wait and tag, as `finish` does.
                    return
                if credentials.failure is not None or hints.is_expired(text):
                    why = credentials.failure.message if credentials.failure is not None else failed.message
                    raise CloudFailed(
                        f"AWS did not accept Packer's credentials any more: {why}",
                        hint=hints.LOGIN,
                        log=failed.log,
                        tail=failed.tail,
                    ) from failed
                failed.hint = failed.hint or hints.in_output(text)
                if self.instance:
                    raise
                # Before there is an instance only the account or its network can have failed.
                raise CloudFailed(
                    failed.message, hint=failed.hint, log=failed.log, tail=failed.tail
                ) from failed

    def _is_pending(self) -> bool:
        try:
            found = self._made()
        except AmiBuilderError:
            # Packer's credentials have expired too, or EC2 fails.
            return False
        return found is not None and found.pending

    def _refused(self) -> AmiBuilderError | None:
        """Return why EC2 does not answer these credentials; None when it does."""
        try:
            images.describe(self.account, self.base.id)
        except AmiBuilderError as failed:
            return failed
        return None

    def _more_services(self) -> Sequence[str]:
        """Return the services that Packer uses beside EC2."""
        return ("ssm", "ec2-instance-connect") if self.aws.connect is Connect.SESSION_MANAGER else ()

    def _require_imdsv2(self, step: Step, *, last: bool) -> None:
        """Turn off IMDSv1, which EC2 allows once the instance runs; say so if it still can't be done then."""
        try:
            instances.require_imdsv2(self.account, self.instance)
            self.imdsv1 = None
        except AmiBuilderError as failed:
            self.imdsv1 = failed
            if last:
                step.announce(f"{self.instance} still has IMDSv1 while it bakes: {failed.message}")
                self.imdsv1 = None

    def _settle(self, instance: LedgerEntry, template: LedgerEntry | None) -> bool:
        """End the instance and what launched it, as Packer does unless it was killed or cut off.

        Return False if that is not known to have worked. An AMI stays in the ledger: one whose making was not
        answered may show only later.
        """
        with suppress(AmiBuilderError):
            left = instances.of_run(self.account, self.run_id)
            # One that was launched a moment ago may not be listed yet.
            if self.instance and not self.ami:
                left.append(self.instance)
            for one in dict.fromkeys(left):
                instances.terminate(self.account, one)
            self.ledger.deleted(instance)
            if template is not None:
                orphans.delete_templates(self.account, self.run_id)
                self.ledger.deleted(template)
            return True
        return False
