"""A second domain with a jargon of its own: notes from a clinic, for continual pre-training. None of it is in the corpus."""

from __future__ import annotations

from base.dice import Dice, tidy

COMPLAINTS = {
    "chest pain": ("tender sternum", "costochondritis", "naproxen", "mg"), "dyspnoea": ("bilateral wheeze", "asthma exacerbation", "salbutamol", "mcg"),
    "polyuria": ("dry mucosa", "type 2 diabetes", "metformin", "mg"), "palpitations": ("irregular pulse", "atrial fibrillation", "bisoprolol", "mg"),
    "productive cough": ("basal crepitations", "lobar pneumonia", "amoxicillin", "mg"), "dysuria": ("suprapubic tenderness", "cystitis", "nitrofurantoin", "mg"),
    "cephalgia": ("normal fundi", "migraine", "sumatriptan", "mg"), "pedal oedema": ("raised jugular pressure", "heart failure", "furosemide", "mg"),
    "epigastric pain": ("no guarding", "gastritis", "omeprazole", "mg"), "pruritus": ("erythematous plaques", "eczema", "hydrocortisone cream", "%"),
    "arthralgia": ("synovial swelling", "rheumatoid arthritis", "methotrexate", "mg"), "vertigo": ("positive Hallpike", "positional vertigo", "betahistine", "mg"),
    "fatigue": ("conjunctival pallor", "iron deficiency anaemia", "ferrous sulphate", "mg"), "pyrexia": ("exudative tonsils", "tonsillitis", "phenoxymethylpenicillin", "mg"),
}  # fmt: skip
HISTORY = (
    "hypertension",
    "hyperlipidaemia",
    "appendicectomy",
    "hypothyroidism",
    "gout",
    "nil of note",
    "osteoporosis",
    "ex-smoker",
    "atopy",
    "cholecystectomy",
)
TESTS = ("FBC", "CRP", "U&E", "LFT", "HbA1c", "TSH", "troponin", "D-dimer", "urinalysis", "ferritin")
IMAGING = ("CXR", "ECG", "abdominal USS", "CT head", "echocardiogram", "spirometry")


def note(dice: Dice) -> str:
    """A consultation note, in prose or under headings."""
    complaint = dice.one(tuple(COMPLAINTS))
    sign, diagnosis, drug, unit = COMPLAINTS[complaint]
    sex = dice.one(("male", "female"))
    age, days = dice.number(18, 91), dice.number(1, 21)
    vitals = f"BP {dice.number(98, 178)}/{dice.number(56, 104)}, HR {dice.number(52, 128)}, RR {dice.number(12, 28)}, SpO2 {dice.number(89, 100)}% on air, T {dice.number(355, 395) / 10}"
    dose = f"{dice.one((1, 2, 5, 10, 20, 40, 100, 250, 500))} {unit}"
    tests = dice.some(TESTS, 2)
    plan = dice.expand(
        "{drug} {dose} [od|bd|tds|qds|prn][ PO| for {n} days|]. [Review in {n} days|Safety-netted|Discharged to GP|Refer to outpatients|Admit for observation]. [Repeat {test}|Chase {test}|{image} if not settling]."
    )
    slots = {"drug": drug, "dose": dose, "n": str(dice.number(3, 14)), "test": tests[0], "image": dice.one(IMAGING)}
    if dice.chance(0.5):
        return dice.say(
            "{age}-year-old {sex} presenting with a {days}-day history of {complaint}. [PMH: {history}|Background of {history}]. [On examination|O/E]: {sign}, {vitals}. "
            "[{a} and {b} sent|{a} raised, {b} normal|{a} normal, {b} pending]. [Impression|Working diagnosis]: {diagnosis}[|, differential includes {other}]. Plan: " + plan,
            age=age, sex=sex, days=days, complaint=complaint, history=dice.one(HISTORY), sign=sign, vitals=vitals, a=tests[0], b=tests[1], diagnosis=diagnosis,
            other=COMPLAINTS[dice.one([name for name in COMPLAINTS if name != complaint])][1], **slots,
        )  # fmt: skip
    return "\n".join((
        f"PC: {complaint}, {days}/7.", f"PMH: {', '.join(dice.some(HISTORY, 2))}.", f"O/E: {sign}. {vitals}.", f"Ix: {tests[0]} {dice.one(('raised', 'normal', 'pending'))}, {tests[1]} {dice.one(('normal', 'borderline'))}.",
        f"Imp: {diagnosis}.", tidy("Plan: " + dice.say(plan, **slots)),
    ))  # fmt: skip
