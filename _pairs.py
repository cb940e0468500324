import asyncio,tempfile,shutil,psutil,time,sys
from pathlib import Path
from bench.desk import desk_up
from bench import load
async def main():
    d=Path(tempfile.mkdtemp(prefix='pairs-',dir='/var/tmp')); d.chmod(0o755)
    out=open('/tmp/mine/pairs.log','a')
    async with desk_up(d/'one') as desk:
        shown=await desk.client_keys(64)
        for s in ((),shown): await load.orders(desk.orders_url,64,2,d,s)
        end=time.time()+float(sys.argv[1])
        while time.time()<end:
            # wait for a quiet moment
            a=psutil.cpu_percent(1.0)
            if a>45: await asyncio.sleep(2); continue
            row=[]
            for conns in (64,1000):
                for name,s in (('plain',()),('keys',shown)):
                    t0=psutil.cpu_times(); c0=desk.cpu_seconds(); 
                    run=await load.orders(desk.orders_url,conns,2,d,s)
                    t1=psutil.cpu_times(); c1=desk.cpu_seconds()
                    total=sum(t1)-sum(t0)-(t1.guest-t0.guest); idle=t1.idle-t0.idle+t1.iowait-t0.iowait
                    own=sum(c1[k]-c0.get(k,0) for k in c1)+run.load_cpu_seconds
                    others=(total-idle-own)/total
                    row.append(f"{conns}{name} {run.per_second:.0f} desk {(c1['desk']-c0['desk'])/run.answers*1e6:.0f} others {others:.2f}")
            print(time.strftime('%H:%M:%S'),' | '.join(row),file=out,flush=True)
            await asyncio.sleep(8)
    shutil.rmtree(d)
asyncio.run(main())
