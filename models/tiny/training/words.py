"""The words the tiny model can read: common on signs, labels, tools and screens."""

WORDS = tuple(
    """
able acid after air alarm all alpha apple april arm art auto away axis baby back bag ball bank bar
base basic bath battery beach bean bear bed beef bell belt best beta big bike bill bird black blue
board boat body bolt book boot bottle bottom box brake brass bread break brick bridge bright brown
brush bus butter button cable cake call camera camp can candy car card care cargo case cash cat
cell center chain chair change charge check cheese cherry chest chip city class clean clear clock
close cloth cloud club coal coast code coffee coin cold color cook cool copper copy corn cotton
count cover cream cross cup cut cycle danger dark data date day deep delta desk dial diesel dig
dinner dish dock doctor dog door double down dream dress drill drink drive drop dry dust early
earth east easy edge egg eight empty end energy engine enter entry error even exit export extra
face fan farm fast feet file film filter fine finger fire first fish five flag flash flat floor
flour flow flower food foot fork four fox free fresh friday front fruit fuel full fuse game garden
gas gate gear girl glass glove glue goat gold good grain grand grape grass green grid ground group
guard guide half hall hammer hand happy harbor hard heart heat heavy help high hold home honey
hook horse hotel hour house ice idea inch index ink input iron island item jacket juice july jump
june key kitchen knife label lake lamp land large laser last late leaf left lemon letter level
light lime line lion liquid list local lock logic long loop lot low lucky lunch magnet mail main
map march mark market mask master meat medium menu metal meter middle milk mind mine mirror mode
monday money moon motor mouse music nail name near needle net never new night nine noise normal
north note nurse ocean off office oil old olive one onion open orange order oven owner paint paper
park part party pass path pause pearl pen pepper phone photo piano pilot pink pipe pizza place
plane plant plate play plug point police pool port post potato power press price prime print
private public pull pump pure push quick quiet radio rail rain ready red relay repair reset rest
return rice right ring river road rock roof room root rope round rubber run safe salad sale salt
sand sauce save scale school screen screw sea seal season second sensor service set seven ship
shirt shoe shop short show side signal silver six size sky sleep slide slow small smart smoke
smooth snow soap socket soft solar south space spare speed spoon spring square stable star start
state station steam steel step stone stop store storm street strong sugar summer sun supply
surface sweet switch system table tail tank tape taxi tea team tent test thin three ticket tiger
time tin tiny tire toast today tool total tower town track train travel tree truck tube tuesday
turn twist two under unit upper user valve video view village voice volt wagon wait walk wall warm
warning washer waste watch water wave week weight west wheel white wide wild wind window wing
winter wire wolf wood wool work world yard year yellow zebra zero zinc zone
""".split()
)
