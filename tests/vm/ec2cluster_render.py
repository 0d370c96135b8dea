"""Prints the user data of one instance. Runs among dask-cloudprovider's packages: see ec2cluster.py.

EC2Cluster.get_cloud_init renders `dask-scheduler --version` in place of the command. So the scheduler or the
worker is made as SpecCluster makes it, and rendered as its create_vm does for RunInstances.
"""

import asyncio
import sys

from dask_cloudprovider.aws import EC2Cluster  # type: ignore[import-not-found]


async def main(image: str, *scheduler: str) -> None:
    cluster = EC2Cluster(asynchronous=True, docker_image=image, bootstrap=False, security=False)
    if scheduler:
        instance = cluster.worker_class(*scheduler, **cluster.worker_options)
    else:
        instance = cluster.scheduler_class(**cluster.scheduler_options)
    sys.stdout.write(cluster.render_process_cloud_init(instance))


asyncio.run(main(*sys.argv[1:]))
